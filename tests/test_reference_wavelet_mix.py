"""The wavelet branch against PyWavelets and a convolution per channel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, SIZES, assert_close, assert_matches

from swformer_fast.reference import WaveletBranch, wavelet_mix
from swformer_fast.reference.haar_dwt2d import HAAR_HIGH, HAAR_LOW


def arguments(size, kernel=3, dtype=torch.float64, batch=2, channels=2):
    shapes = [(batch, channels, *size), (4 * channels, 1, kernel, kernel), (4 * channels,), (2,), (2,), (2,), (2,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def haar_taps(dtype=torch.float64):
    return [torch.tensor(taps, dtype=dtype) for taps in (HAAR_LOW, HAAR_HIGH, HAAR_LOW, HAAR_HIGH)]


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equals_pywavelets_and_a_convolution_per_channel(size, kernel):
    pywt = pytest.importorskip("pywt")
    x, weight, bias, *_ = (arg.detach() for arg in arguments(size, kernel))
    expected = torch.empty_like(x)
    for b, c in np.ndindex(*x.shape[:2]):
        approximation, details = pywt.dwt2(x[b, c].numpy(), "haar")
        mixed = []
        for band, coefficients in enumerate((approximation, *details)):
            k = band * x.shape[1] + c
            plane = torch.from_numpy(coefficients)[None, None]
            mixed.append(F.conv2d(plane, weight[k : k + 1], bias[k : k + 1], padding=kernel // 2)[0, 0].numpy())
        plane = pywt.idwt2((mixed[0], tuple(mixed[1:])), "haar")
        expected[b, c] = torch.from_numpy(plane)[: size[0], : size[1]]
    assert_close(wavelet_mix(x, weight, bias, *haar_taps()), expected)


@pytest.mark.parametrize("size", [(4, 4), (3, 2), (1, 1)])
def test_gradients(size):
    args = arguments(size, batch=1)
    assert torch.autograd.gradcheck(wavelet_mix, args)
    assert torch.autograd.gradgradcheck(wavelet_mix, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype):
    x, *parameters = arguments((9, 12), dtype=torch.float32, batch=3)
    x = LAYOUTS[layout](x.detach().to(dtype)).requires_grad_()
    assert_matches(wavelet_mix, wavelet_mix, (x, *parameters), gradients=dtype == torch.float32)


def test_module():
    branch = WaveletBranch(3, kernel_size=5)
    x = torch.randn(2, 3, 7, 6)
    assert {name: tuple(p.shape) for name, p in branch.state_dict().items()} == {
        **dict.fromkeys(("dec_lo", "dec_hi", "rec_lo", "rec_hi"), (2,)),
        "conv.weight": (12, 1, 5, 5),
        "conv.bias": (12,),
    }
    assert_close(branch(x), wavelet_mix(x, branch.conv.weight, branch.conv.bias, *haar_taps(torch.float32)))
    assert branch(x[:0]).shape == (0, 3, 7, 6)


def test_identity_kernel_reconstructs_the_image():
    branch = WaveletBranch(3)
    with torch.no_grad():
        branch.conv.bias.zero_()
        branch.conv.weight.zero_()[:, :, 1, 1] = 1
    x = torch.randn(2, 3, 7, 6)
    assert_close(branch(x), x)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"dim": -1}, ValueError, "dim"),
        ({"dim": "3"}, TypeError, "dim"),
        ({"dim": 2, "kernel_size": 2}, ValueError, "kernel_size"),
    ],
)
def test_constructor_errors(options, error, name):
    with pytest.raises(error, match=name):
        WaveletBranch(**options)
