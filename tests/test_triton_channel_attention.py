"""The Triton kernels of channel attention against the reference in fp64, interpreted unless there is a GPU."""

import pytest
import torch
from helpers import LAYOUTS, assert_close, poisoned_memory, zero_kernel
from torch import Tensor

import swformer_fast as sf
from benchmarks.inspection.interpret import count_traffic
from swformer_fast import functional, reference
from swformer_fast.parameters import AttentionParameters

channel_attention = pytest.importorskip("swformer_kernels.channel_attention", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


def _random(shape: tuple[int, ...], layout: str = "contiguous") -> Tensor:
    """Numbers whose mean is not 0."""
    return LAYOUTS[layout](torch.randn(shape, device=DEVICE) + 0.3)


def _parameters(channels: int, hidden: int) -> tuple[Tensor, ...]:
    shapes = ((hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,))
    w1, b1, w2, b2 = (torch.randn(shape, device=DEVICE) for shape in shapes)
    return w1 / channels**0.5, b1, w2 / hidden**0.5, b2


def _reference(x: Tensor, *parameters: Tensor) -> Tensor:
    return reference.channel_attention(x, AttentionParameters(*parameters))


def _check(x: Tensor, hidden: int) -> None:
    args = (x, *_parameters(x.shape[1], hidden))
    grad = _random(tuple(x.shape))
    with poisoned_memory():
        y = channel_attention.channel_attention(*args)
        grads = channel_attention.channel_attention_backward(grad, *args, True, True)
    assert y.dtype == grads[0].dtype == x.dtype
    inputs = tuple(t.double().contiguous().requires_grad_() for t in args)
    expected = _reference(*inputs)
    assert_close(y, expected, what="output")
    assert_close(grads, torch.autograd.grad(expected, inputs, grad.double()), x.dtype, what="gradient")
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.stride() == grads[0].stride() == (torch.empty_like(x) if last else torch.empty(x.shape)).stride()


@pytest.mark.parametrize(
    ("shape", "hidden"), [((2, 5, 1, 1), 2), ((1, 1, 3, 5), 1), ((2, 70, 3, 5), 33), ((1, 3, 65, 96), 2)]
)
def test_sizes(shape: tuple[int, ...], hidden: int) -> None:
    _check(_random(shape), hidden)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_partial_sums(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_attention, "_TILE", 64)
    monkeypatch.setattr(channel_attention, "_TILES_A_PARTIAL", 2)
    monkeypatch.setattr(channel_attention, "_CHANNELS_OF_CHANNELS_LAST", 4)
    monkeypatch.setattr(channel_attention, "_WEIGHTS", 8)
    _check(_random((2, 7, 9, 20), layout), 3)


def test_what_is_refused() -> None:
    x, parameters = _random((1, 6, 3, 4)).double(), _parameters(6, 2)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        channel_attention.channel_attention(x, *parameters)
    with sf.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        functional.channel_attention(x, AttentionParameters(*(p.double() for p in parameters)))


@pytest.mark.parametrize(
    ("kernel", "output"),
    [
        ("attention_sums_kernel", "partials"),
        ("attention_network_kernel", "scale"),
        ("attention_apply_kernel", "out"),
        *(("attention_parameters_kernel", output) for output in ("grad_w1", "grad_b1", "grad_w2", "grad_b2")),
        *(
            ("attention_network_backward_kernel", output)
            for output in ("scale", "shift", "mean", "grad_logits", "hiddens", "grad_hiddens")
        ),
    ],
)
def test_zeroed_kernel_fails(kernel: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zero_kernel(monkeypatch, kernel, output)
    with pytest.raises(AssertionError):
        _check(_random((2, 6, 3, 4)), 4)


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_traffic(layout: str) -> None:
    """The image is read twice, as its mean must be known before it is scaled; going back so is the gradient."""
    x, parameters = _random((1, 4, 32, 64), layout), _parameters(4, 1)
    with count_traffic() as forward:
        channel_attention.channel_attention(x, *parameters)
    with count_traffic() as backward:
        channel_attention.channel_attention_backward(x.clone(), x, *parameters, True, True)
    for traffic, passes in ((forward, 3), (backward, 4)):
        assert traffic.total <= 1.1 * passes * x.nbytes
        assert traffic.stored == traffic.distinct_stored
