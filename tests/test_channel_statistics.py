"""channel_statistics: precision, and the blocks' use of it. What every op keeps is in test_contract.py."""

from collections.abc import Iterator

import pytest
import torch
from contract import needs_cpp
from helpers import assert_close, fp64, poisoned_memory, randomise, value_and_grads
from torch import Tensor, nn

import swformer_fast as sf
from swformer_fast import reference

pytestmark = needs_cpp
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    with sf.use_backend("cpp"):
        yield


def statistics(x: Tensor) -> Tensor:
    return torch.ops.swformer_fast.channel_statistics(x)[0]


def check(x: Tensor) -> None:
    with poisoned_memory():
        actual, mean = value_and_grads(statistics, (x,)), torch.ops.swformer_fast.channel_statistics(x)[1]
    expected = value_and_grads(lambda x: reference.channel_statistics(x)[0], fp64((x,)))
    dtype_of_sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert actual[0].dtype == dtype_of_sums
    assert mean.dtype == torch.float64
    for row, wanted in zip((*actual[0], mean), (*expected[0], expected[0][0]), strict=True):
        assert_close(row, wanted, dtype_of_sums)
    assert_close(actual[1], expected[1], x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 1, 1, 5), (2, 5, 7, 9), (3, 4, 33, 40), (1, 2, 64, 65)])
def test_matches_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check((torch.randn(shape) + 0.3).to(dtype).requires_grad_())


def test_large_mean() -> None:
    """The variance of numbers around 1,000 is as exact as that of numbers around 0."""
    check((0.5 * torch.randn(2, 3, 40, 41) + 1000).requires_grad_())
    constant = statistics(torch.full((2, 3, 40, 41), 0.1))
    assert (constant[1] < 1e-15).all()


def test_edges() -> None:
    empty = torch.randn(0, 3, 4, 5, requires_grad=True)
    output, (grad,) = value_and_grads(statistics, (empty,))
    assert output.isnan().all()
    assert grad.shape == empty.shape
    single = statistics(torch.randn(1, 3, 1, 1))
    assert (single[1] == 0).all()
    bad = torch.randn(2, 3, 4, 5)
    bad[1, 2, 3, 4] = float("nan")
    assert statistics(bad).isnan().tolist() == [[False, False, True]] * 2


def blocks(dim: int, **norm: object) -> tuple[nn.Module, nn.Module]:
    """A reference and a fast block in training, equal, with norms made with these arguments."""
    torch.manual_seed(0)
    pair = sf.reference.SWFormerBlock(dim), sf.SWFormerBlock(dim)
    for block in pair:
        for name in ("norm1", "norm2"):
            setattr(block, name, nn.BatchNorm2d(dim, **norm))
    randomise(pair[0])
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0].double().train(), pair[1].train()


@pytest.mark.parametrize(
    "norm", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 1e-2}]
)
def test_blocks_fold_the_statistics(norm: dict[str, object]) -> None:
    expected, fast = blocks(8, **norm)
    for _ in range(2):
        x = torch.randn(2, 8, 12, 10, requires_grad=True)
        in_fp64 = x.detach().double().requires_grad_()
        grad = torch.randn(2, 8, 12, 10)
        y, wanted = fast(x), expected(in_fp64)
        assert_close(y, wanted)
        grads = torch.autograd.grad(y, [x, *fast.parameters()], grad)
        assert_close(grads, torch.autograd.grad(wanted, [in_fp64, *expected.parameters()], grad.double()))
    for (name, a), b in zip(fast.named_buffers(), expected.buffers(), strict=True):
        assert_close(a, b, torch.float32, name)


def test_a_block_keeps_no_normalised_map() -> None:
    _, fast = blocks(8)
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fast(x)
    # x, the inputs and outputs of the spatial and wavelet branches, the Fourier branch's output, the FFN's input.
    assert sum(n >= x.nbytes for n in kept.values()) <= 7
    assert y.shape == x.shape


def test_a_single_value_is_refused() -> None:
    _, fast = blocks(8)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fast(torch.randn(1, 8, 1, 1))


def test_compiles() -> None:
    """Batch statistics leave no break in the graph of a block in training."""
    _, fast = blocks(8)
    twin = sf.SWFormerBlock(8).train()
    twin.load_state_dict(fast.state_dict())
    x, grad = torch.randn(2, 8, 12, 10, requires_grad=True), torch.randn(2, 8, 12, 10)
    torch._dynamo.reset()
    actual = value_and_grads(torch.compile(fast, backend="aot_eager", fullgraph=True), (x,), grad)
    assert_close(actual, value_and_grads(twin, (x,), grad), torch.float32)
    assert_close(fast.norm1.running_var, twin.norm1.running_var)
