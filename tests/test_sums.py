"""The second output of the branches' ops, the sums of the first over the pixels, and the gradients through it."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, fp64, poisoned_memory, rel_rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import swformer_fast as sf
from swformer_fast import functional, reference

BRANCHES = {"depthwise_gelu": sf.SpatialBranch, "wavelet_mix": sf.WaveletBranch, "fourier_mix": sf.FourierBranch}
KERNELS = [name for name in ("cpp",) if sf.backends()[name] == "available"]
BACKENDS = ["reference", *KERNELS, *["triton"][: importlib.util.find_spec("triton") is not None]]
Arguments = tuple[Any, ...]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with sf.use_backend(request.param):
        yield request.param


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Any:
    with sf.use_backend(request.param):
        yield request.param


@pytest.fixture(params=BRANCHES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def with_sums(name: str, need_sums: bool = True) -> Callable[..., tuple[Tensor, Tensor]]:
    function = functional.fourier_mix_and_sums if name == "fourier_mix" else getattr(torch.ops.swformer_fast, name)
    return lambda *args: function(*args, need_sums)


def expected(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(*args: Any) -> tuple[Tensor, Tensor]:
        y = getattr(reference, name)(*args)
        return y, y.sum((2, 3))

    return function


def arguments(
    name: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    training: bool = False,
    **options: int,
) -> Arguments:
    """An image and the parameters of a branch: the arguments of function `name`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    branch = BRANCHES[name](shape[1], **options).to(wide).train(training)
    x = torch.randn(shape, dtype=wide)
    if name == "fourier_mix":
        branch.conv_in.bias.data.mul_(0.05)  # as in test_fourier: the gate must not saturate at the zero frequency
    else:
        x += 0.5
        for parameter in branch.parameters():  # of the bands of Haar's filters but one the sums hold nothing
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    x = LAYOUTS[layout](x.to(dtype)).requires_grad_()
    return x, *tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), branch.arguments())


def leaves(args: Arguments) -> list[Tensor]:
    return [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]


def check(name: str, args: Arguments) -> None:
    """Both outputs, and the gradients through the second alone and through both."""
    dtype, wide = args[0].dtype, fp64(args)
    targets = expected(name)(*wide)
    # Those of the sums are of one sign: gradients made of so few terms must not cancel.
    grads = [torch.randint(low, 65, t.shape) / 64 for low, t in zip((-64, 1), targets, strict=True)]
    with poisoned_memory():
        outputs = with_sums(name)(*args)
        assert outputs[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(outputs, targets, dtype, "output")
        for chosen in ([1], [0, 1]):
            found, wanted = (
                torch.autograd.grad(
                    [all_outputs[i] for i in chosen],
                    leaves(all_args),
                    [grads[i].to(all_outputs[i]) for i in chosen],
                    retain_graph=True,
                )
                for all_outputs, all_args in ((outputs, args), (targets, wide))
            )
            assert_close(found, wanted, dtype, f"gradient through {chosen}")


@pytest.mark.parametrize("size", [*SIZES[1:], (3, 200), (96, 1)])
def test_matches_reference(kernels: str, name: str, size: tuple[int, int]) -> None:
    check(name, arguments(name, 3, 5, *size))


@pytest.mark.parametrize("training", [False, True])
def test_small(backend: str, name: str, training: bool) -> None:
    check(name, arguments(name, 2, 3, 5, 7, training=training))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [5, 21])
def test_layouts_and_dtypes(kernels: str, name: str, layout: str, channels: int, dtype: torch.dtype) -> None:
    check(name, arguments(name, 3, channels, 19, 37, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 1), (19, 37), (20, 70)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("name", ["depthwise_gelu", "wavelet_mix"])
def test_double_precision(kernels: str, name: str, kernel: int, size: tuple[int, int], layout: str) -> None:
    check(name, arguments(name, 2, 9, *size, kernel_size=kernel, dtype=torch.float64, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ranges_of_rows_add_up(kernels: str, name: str, layout: str) -> None:
    check(name, arguments(name, 1, 2, 402, 21, layout=layout))


def test_long_sums_keep_their_precision(kernels: str, name: str) -> None:
    """A million terms of one sign: a single running sum in fp32 would be off by 1e-4."""
    args = tree_map_only(Tensor, lambda t: t.detach(), arguments(name, 1, 1, 1024, 1024))
    args = (torch.rand_like(args[0]) + 3, *tree_map_only(Tensor, torch.abs, args[1:]))
    assert rel_rms(with_sums(name)(*args)[1], expected(name)(*fp64(args))[1]) < 5e-7


def test_no_last_convolution(backend: str) -> None:
    x, parameters, *options = arguments("fourier_mix", 2, 3, 6, 9)
    check("fourier_mix", (x, parameters._replace(out_weight=None, out_bias=None), *options))


def test_nothing_where_not_asked_for(backend: str, name: str) -> None:
    args = arguments(name, 2, 3, 4, 5)
    y, sums = with_sums(name, False)(*args)
    assert sums.shape == (0,)
    assert sums.dtype == torch.float32
    assert not sums.requires_grad
    assert torch.equal(y, getattr(functional, name)(*args))


def test_empty_batch(backend: str, name: str) -> None:
    args = arguments(name, 0, 3, 8, 9)
    y, sums = with_sums(name)(*args)
    assert sums.shape == (0, 3)
    grads = torch.autograd.grad(y.sum() + sums.sum(), leaves(args))
    assert not any(g.any() for g in grads)


def test_autocast(backend: str, name: str) -> None:
    args = arguments(name, 2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, sums = with_sums(name)(*args)
    assert (y.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(sums.sum(), leaves(args))
    assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bitwise_repeatable(kernels: str, name: str, layout: str) -> None:
    args = arguments(name, 3, 20, 96, 70, layout=layout)

    def run() -> list[Tensor]:
        outputs = with_sums(name)(*args)
        return [*outputs, *torch.autograd.grad(outputs, leaves(args), [o.detach().cos() for o in outputs])]

    first, before = run(), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            again = run()
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("chosen", [(0, 1), (1, 0), (1, 1)])
def test_double_backward(kernels: str, name: str, chosen: tuple[int, int]) -> None:
    def penalty(function: Callable[..., tuple[Tensor, Tensor]], args: Arguments) -> list[Tensor]:
        y, sums = function(*args)
        loss = chosen[0] * y.square().sum() + chosen[1] * (sums / y[0, 0].numel()).square().sum()
        grads = torch.autograd.grad(loss, leaves(args), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves(args), allow_unused=True))

    args = arguments(name, 2, 3, 7, 8)
    for actual, target in zip(penalty(with_sums(name), args), penalty(expected(name), fp64(args)), strict=True):
        assert (actual is None) == (target is None) or not actual.any()
        assert target is None or rel_rms(actual, target) < 1e-4


def test_compiles_without_graph_breaks(kernels: str, name: str) -> None:
    def loss(*args: Any) -> Tensor:
        y, sums = with_sums(name)(args[0].sin(), *args[1:])
        return y.cos().sum() + sums.sin().sum()

    torch._dynamo.reset()
    args = arguments(name, 2, 3, 9, 12)
    actual, eager = (
        torch.autograd.grad(run(*args), leaves(args)) for run in (torch.compile(loss, fullgraph=True), loss)
    )
    assert_close(actual, eager)


def zeroed(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def shuffled(t: Tensor) -> Tensor:
    return t.flatten().roll(1).view_as(t)


@pytest.mark.parametrize("damage", [zeroed, shuffled])
def test_wrong_sums_are_noticed(monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Tensor], Tensor]) -> None:
    def damaged(*args: Any) -> Any:
        y, sums, *others = sf.backend.OPS[name].reference(*args)
        return y, damage(sums), *others

    monkeypatch.setattr(sf.backend, "_implementation", lambda o, b: damaged if o.name == name else o.reference)
    with pytest.raises(AssertionError, match="output 1"):
        check(name, arguments(name, 2, 3, 5, 6))


@pytest.mark.parametrize("damage", [zeroed, shuffled])
def test_wrong_gradients_are_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Tensor], Tensor]
) -> None:
    def damaged(grad: Tensor, grad_sums: Tensor | None, *args: Any) -> Any:
        grad_sums = None if grad_sums is None else damage(grad_sums)
        return sf.backend.OPS[f"{name}_backward"].reference(grad, grad_sums, *args)

    backward = f"{name}_backward"
    monkeypatch.setattr(sf.backend, "_implementation", lambda o, b: damaged if o.name == backward else o.reference)
    with pytest.raises(AssertionError, match=r"gradient through \[1\]"):
        check(name, arguments(name, 2, 3, 5, 6))


@pytest.mark.skipif(not KERNELS, reason="the compiled extension was not built")
@pytest.mark.parametrize("training", [False, True])
def test_a_block_reads_no_map_for_its_mean(training: bool) -> None:
    """Neither forward nor backward has an operator of its own for the sums of channel attention and their gradient."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.on_maps: set[str] = set()

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if any(isinstance(t, Tensor) and t.numel() == x.numel() for t in tree_leaves((args, result))):
                self.on_maps.add(str(op))
            return result

    block = sf.SWFormerBlock(8).train(training)
    x = torch.randn(2, 8, 32, 34, requires_grad=training)
    with Recorder() as recorder:
        y = block(x)
        if training:
            y.backward(torch.ones_like(y))
    names = {op for op in recorder.on_maps if "sum" in op or "mean" in op or "expand" in op}
    assert not names
    assert any("depthwise_gelu" in op for op in recorder.on_maps)
