"""The Haar reference against PyWavelets, and its derivatives."""

import copy

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, TOLERANCE, assert_close, fp64, rel_rms, value_and_grads
from torch import Tensor

from swformer_fast.reference import HaarDWT2d, HaarIDWT2d, haar_dwt2d, haar_idwt2d

LENGTHS = (1, 2, 3, 5, 63, 64, 65, 96)
PAIRS = [(n, n) for n in LENGTHS] + [(1, 2), (3, 64), (63, 2), (65, 96), (96, 63), (5, 1)]


def bands(x: np.ndarray) -> Tensor:
    pywt = pytest.importorskip("pywt")
    approximation, details = pywt.dwt2(x, "haar", axes=(2, 3))
    return torch.from_numpy(np.concatenate((approximation, *details), axis=1))


def taps(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    low, high = torch.randn(2, 2, dtype=dtype)
    return low.clone().requires_grad_(requires_grad), high.clone().requires_grad_(requires_grad)


@pytest.mark.parametrize("size", PAIRS)
def test_dwt_equals_pywavelets(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_close(haar_dwt2d(x), bands(x.numpy()))


@pytest.mark.parametrize("size", [s for s in PAIRS if s[0] % 2 == 0 and s[1] % 2 == 0])
def test_idwt_equals_pywavelets(size):
    pywt = pytest.importorskip("pywt")
    y = torch.randn(2, 12, size[0] // 2, size[1] // 2, dtype=torch.float64)
    ll, *details = (band.numpy() for band in y.chunk(4, dim=1))
    assert_close(haar_idwt2d(y), torch.from_numpy(pywt.idwt2((ll, tuple(details)), "haar", axes=(2, 3))))


@pytest.mark.parametrize("size", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_perfect_reconstruction(size, dtype):
    x = torch.randn(2, 3, *size, dtype=dtype)
    assert_close(haar_idwt2d(haar_dwt2d(x), output_size=size), x)


def test_dwt_keeps_the_energy():
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(haar_dwt2d(x).square().sum(), x.square().sum())


def test_any_filters_by_the_equation():
    """Every band of random filters, by explicit sums over the four taps."""
    x, (low, high) = torch.randn(2, 3, 6, 8, dtype=torch.float64), taps(requires_grad=False)
    expected = [
        sum(along_h[i] * along_w[j] * x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        for along_h, along_w in ((low, low), (high, low), (low, high), (high, high))
    ]
    assert_close(haar_dwt2d(x, low, high), torch.cat(expected, dim=1))


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_idwt_is_the_transpose_of_dwt(size):
    """<DWT x, y> = <x, IDWT y> for any filters; on odd sides the replicated sample's share is folded back."""
    height, width = size[0] + size[0] % 2, size[1] + size[1] % 2
    x, (low, high) = torch.randn(2, 3, height, width, dtype=torch.float64), taps(requires_grad=False)
    y = torch.randn(2, 12, height // 2, width // 2, dtype=torch.float64)
    torch.testing.assert_close((haar_dwt2d(x, low, high) * y).sum(), (x * haar_idwt2d(y, low, high)).sum())
    full = haar_idwt2d(y, low, high)
    assert torch.equal(haar_idwt2d(y, low, high, size), full[..., : size[0], : size[1]])


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_dwt_gradients(size):
    x, (low, high) = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True), taps()
    assert torch.autograd.gradcheck(haar_dwt2d, (x, low, high))
    assert torch.autograd.gradgradcheck(haar_dwt2d, (x, low, high))


@pytest.mark.parametrize("size", [None, (4, 3), (3, 4)])
def test_idwt_gradients(size):
    y, (low, high) = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True), taps()
    assert torch.autograd.gradcheck(haar_idwt2d, (y, low, high, size))
    assert torch.autograd.gradgradcheck(haar_idwt2d, (y, low, high, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(dtype, layout):
    """fp32 filters may meet half input; the output has the input's dtype.

    In half precision autograd rounds the filters' gradients channel by channel, so only fp32 is held to the tolerance.
    """
    x = LAYOUTS[layout](torch.randn(3, 5, 9, 12).to(dtype))
    low, high = (torch.randn(2, requires_grad=True) for _ in range(2))
    y, grads = value_and_grads(haar_dwt2d, (x.detach().requires_grad_(), low, high))
    expected, expected_grads = value_and_grads(haar_dwt2d, fp64((x.detach().requires_grad_(), low, high)))
    assert y.dtype == dtype
    assert grads[1] is not None
    assert grads[1].dtype == torch.float32
    assert_close(y, expected)
    held = slice(None) if dtype == torch.float32 else slice(1)
    assert_close(grads[held], expected_grads[held])
    assert rel_rms(haar_idwt2d(haar_dwt2d(x), output_size=(9, 12)), x.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 3, 5, 7)])
def test_empty_batch(shape):
    x, (low, high) = torch.randn(shape, requires_grad=True), taps(torch.float32)
    y = haar_dwt2d(x, low, high)
    assert y.shape == (0, 12, (shape[2] + 1) // 2, (shape[3] + 1) // 2)
    out = haar_idwt2d(y, low, high, shape[2:])
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is not None
    assert low.grad is not None
    assert x.grad.shape == shape
    assert not low.grad.any()


def test_modules():
    x = torch.randn(2, 3, 7, 10)
    dwt, idwt = HaarDWT2d(), HaarIDWT2d()
    assert list(dwt.state_dict()) == ["dec_lo", "dec_hi"]
    assert list(idwt.state_dict()) == ["rec_lo", "rec_hi"]
    assert_close(idwt(dwt(x), (7, 10)), x)
    assert torch.equal(dwt(x), haar_dwt2d(x))
    with torch.no_grad():
        dwt.dec_lo.copy_(torch.tensor([0.3, 0.9]))
    assert not torch.allclose(dwt(x), haar_dwt2d(x))
    twin = copy.deepcopy(dwt)
    assert torch.equal(twin(x), haar_dwt2d(x, dwt.dec_lo, dwt.dec_hi))


def test_fixed_modules_have_no_state():
    x = torch.randn(1, 2, 4, 4)
    dwt, idwt = HaarDWT2d(learnable=False), HaarIDWT2d(learnable=False)
    assert not dwt.state_dict()
    assert not list(idwt.parameters())
    assert_close(idwt(dwt(x)), x)
