"""The spatial branch against sums written out."""

import math

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, assert_matches

from swformer_fast.reference import SpatialBranch, depthwise_gelu


def arguments(size, kernel=3, dtype=torch.float64, batch=2, channels=3):
    shapes = ((batch, channels, *size), (channels, 1, kernel, kernel), (channels,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def naive(x, weight, bias):
    """Each output sample as a sum over the taps that fall inside the image, then the error function."""
    _, channels, height, width = x.shape
    reach = weight.shape[-1] // 2
    y = torch.zeros_like(x) + bias.reshape(1, channels, 1, 1)
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            rows = slice(max(0, -i), max(0, min(height, height - i)))
            cols = slice(max(0, -j), max(0, min(width, width - j)))
            taken = x[..., rows.start + i : rows.stop + i, cols.start + j : cols.stop + j]
            if taken.numel():
                y[..., rows, cols] += weight[:, 0, i + reach, j + reach].reshape(1, channels, 1, 1) * taken
    return 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equals_written_out_sums(size, kernel):
    args = [arg.detach() for arg in arguments(size, kernel)]
    assert_close(depthwise_gelu(*args), naive(*args))


@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
def test_gradients(size):
    args = arguments(size)
    assert torch.autograd.gradcheck(depthwise_gelu, args)
    assert torch.autograd.gradgradcheck(depthwise_gelu, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype):
    x, *parameters = arguments((9, 12), dtype=torch.float32, batch=3)
    x = LAYOUTS[layout](x.detach().to(dtype)).requires_grad_()
    assert_matches(depthwise_gelu, depthwise_gelu, (x, *parameters), gradients=dtype == torch.float32)


def test_module():
    branch = SpatialBranch(4, kernel_size=5)
    x = torch.randn(2, 4, 7, 6)
    assert {name: tuple(p.shape) for name, p in branch.state_dict().items()} == {
        "conv.weight": (4, 1, 5, 5),
        "conv.bias": (4,),
    }
    assert torch.equal(branch(x), depthwise_gelu(x, branch.conv.weight, branch.conv.bias))
    assert branch(x[:0]).shape == (0, 4, 7, 6)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"dim": 0}, ValueError, "dim"),
        ({"dim": 2.0}, TypeError, "dim"),
        ({"dim": 2, "kernel_size": 4}, ValueError, "kernel_size"),
    ],
)
def test_constructor_errors(options, error, name):
    with pytest.raises(error, match=name):
        SpatialBranch(**options)
