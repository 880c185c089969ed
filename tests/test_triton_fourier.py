"""The Triton kernels of the Fourier branch against plain PyTorch in fp64, interpreted unless there is a GPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import Zeroing, assert_close, fp64, poisoned_memory, rel_rms, tf32, value_and_grads
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference

fourier = pytest.importorskip("swformer_kernels.fourier", reason="triton is not installed")
common = pytest.importorskip("swformer_kernels._common")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = [(5, 4, 3), (1, 1, 1), (17, 33, 9), (40, 40, 40)]


def _spectrum(batch: int, channels: int, height: int, width: int) -> Tensor:
    x = torch.randn(batch, channels, height, width, device=DEVICE)
    return torch.view_as_real(torch.fft.rfft2(x, norm="ortho")).contiguous()


def _parameters(dim: int, inner: int, outputs: int) -> tuple[Tensor, Tensor]:
    matrix = torch.randn(4 * inner, 2 * (dim + 1), device=DEVICE) / (2 * dim) ** 0.5
    return matrix, torch.randn(outputs, inner, device=DEVICE) / inner**0.5


def _mix(spectrum: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
    """The definition in the docstring of `spectrum_mix`."""
    parts = spectrum.movedim(-1, 1)
    constants = torch.zeros_like(parts[:, :, :1])
    constants[:, 0], constants[:, 1, :, 0, 0] = 1, 1
    columns = torch.cat((parts, constants), 2).flatten(1, 2)
    gate, value = torch.einsum("ij,bjhw->bihw", matrix, columns).chunk(2, 1)
    y = (torch.sigmoid(gate) * F.gelu(value)).unflatten(1, (2, -1))
    return torch.einsum("ec,brchw->behwr", weight, y)


def _image_of(spectrum: Tensor, height: int, width: int) -> Tensor:
    return torch.fft.irfft2(torch.view_as_complex(spectrum.contiguous()), s=(height, width), norm="ortho")


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (6, 7)])
def test_mix(dims: tuple[int, int, int], size: tuple[int, int]) -> None:
    spectrum, parameters = _spectrum(2, dims[0], *size), _parameters(*dims)
    with poisoned_memory():
        actual = fourier.spectrum_mix(spectrum, *parameters, size[1])
    assert_close(actual, _mix(*fp64((spectrum, *parameters))))


def test_error_of_tf32() -> None:
    """By emulation, as the interpreter ignores how products are taken: why tf32 is on request only."""
    spectrum, (matrix, weight) = _spectrum(1, 40, 16, 16), _parameters(40, 40, 40)
    exact = _mix(*fp64((spectrum, matrix, weight)))

    def error(precision: Callable[[Tensor], Tensor]) -> float:
        return rel_rms(_mix(*fp64((precision(spectrum), precision(matrix), precision(weight)))), exact)

    assert 1e-4 < error(tf32) < 1e-3
    assert error(lambda x: tf32(x) + tf32(x - tf32(x))) < 1e-6


def test_several_tiles() -> None:
    spectrum, parameters = _spectrum(2, 3, 9, 20), _parameters(3, 4, 5)
    assert_close(fourier.spectrum_mix(spectrum, *parameters, 20), _mix(*fp64((spectrum, *parameters))))


def test_no_last_convolution() -> None:
    spectrum, (matrix, weight) = _spectrum(2, 3, 5, 8), _parameters(3, 4, 5)
    actual = fourier.spectrum_mix(spectrum, matrix, weight.new_empty(0), 8)
    assert_close(actual, _mix(*fp64((spectrum, matrix, torch.eye(4, device=DEVICE)))))


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (1, 2)])
def test_mix_backward(dims: tuple[int, int, int], size: tuple[int, int]) -> None:
    """Gradients of an image made from an image, through both transforms."""
    x = torch.randn(2, dims[0], *size, device=DEVICE)
    grad = torch.randn(2, dims[2], *size, device=DEVICE)
    parameters = _parameters(*dims)

    def whole(x: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
        return _image_of(_mix(torch.view_as_real(torch.fft.rfft2(x, norm="ortho")), matrix, weight), *size)

    inputs = tuple(t.double().requires_grad_() for t in (x, *parameters))
    expected = torch.autograd.grad(whole(*inputs), inputs, grad.double())
    spectrum, grad_spectrum = (torch.view_as_real(torch.fft.rfft2(t, norm="ortho")).contiguous() for t in (x, grad))
    with poisoned_memory():
        grads = fourier.spectrum_mix_backward(grad_spectrum, spectrum, *parameters, size[1], False, True, True)
    assert_close((_image_of(grads[0], *size), *grads[1:]), expected, torch.float32)


def test_only_what_is_needed() -> None:
    spectrum, parameters = _spectrum(1, 3, 4, 6), _parameters(3, 4, 5)
    grad = _spectrum(1, 5, 4, 6)
    full = fourier.spectrum_mix_backward(grad, spectrum, *parameters, 6, False, True, True)
    only_spectrum = fourier.spectrum_mix_backward(grad, spectrum, *parameters, 6, False, True, False)
    only_parameters = fourier.spectrum_mix_backward(grad, spectrum, *parameters, 6, False, False, True)
    assert [g.numel() for g in only_spectrum[1:]] == [0, 0]
    assert only_parameters[0].numel() == 0
    assert torch.equal(only_spectrum[0], full[0])
    assert all(torch.equal(a, b) for a, b in zip(only_parameters[1:], full[1:], strict=True))


def _moments(spectrum: Tensor) -> Tensor:
    parts = spectrum.permute(4, 0, 1, 2, 3).flatten(3)[..., 1:]
    products = torch.einsum("rbif,rbjf->rij", parts, parts)
    return torch.cat((products, parts.sum((1, 3)).unsqueeze(2)), 2)


@pytest.mark.parametrize("dim", [1, 5, 70])
def test_moments(dim: int) -> None:
    """A zero frequency far larger than the others does not matter."""
    spectrum = _spectrum(2, dim, 7, 9)
    spectrum[:, :, 0, 0] *= 1e4
    with poisoned_memory():
        actual = fourier.spectrum_moments(spectrum)
    assert actual.dtype == torch.float64
    assert_close(actual, _moments(spectrum.double()), torch.float32)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_moments_backward(size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, *size, device=DEVICE)
    grad, grad_moments = torch.randn_like(x), torch.randn(2, 5, 6, dtype=torch.float64, device=DEVICE)
    leaf = x.double().requires_grad_()
    moments = _moments(torch.view_as_real(torch.fft.rfft2(leaf, norm="ortho")))
    (expected,) = torch.autograd.grad(moments, leaf, grad_moments)
    spectrum, grad_spectrum = (torch.view_as_real(torch.fft.rfft2(t, norm="ortho")).contiguous() for t in (x, grad))
    with poisoned_memory():
        actual = fourier.spectrum_moments_backward(grad_spectrum, spectrum, grad_moments, size[1])
    assert_close(_image_of(actual, *size), grad.double() + expected, torch.float32)


def test_repeats_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fourier, "_FREQUENCIES_A_PARTIAL", 32)
    spectrum, parameters, grad = _spectrum(2, 5, 8, 10), _parameters(5, 6, 7), _spectrum(2, 7, 8, 10)
    first, second = (
        (
            *fourier.spectrum_mix_backward(grad, spectrum, *parameters, 10, False, True, True),
            fourier.spectrum_moments(spectrum),
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(first[3], _moments(spectrum.double()), torch.float32)


def test_large_zero_frequency() -> None:
    spectrum, parameters = _spectrum(1, 4, 3, 4), _parameters(4, 4, 4)
    spectrum[:, :, 0, 0, 0] = torch.tensor([1e6, -1e6, 1e6, -1e6])
    actual = fourier.spectrum_mix(spectrum, *parameters, 4)
    assert actual.isfinite().all()
    assert_close(actual, _mix(*fp64((spectrum, *parameters))))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_branch(dtype: torch.dtype, training: bool) -> None:
    """The op on this backend, against the reference."""

    def parameter(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE) * 0.3).requires_grad_()

    def norm() -> tuple[Tensor, ...]:
        return torch.randn(8, device=DEVICE), torch.rand(8, device=DEVICE) + 0.5, parameter(8), parameter(8)

    arguments = (parameter(8, 5, 1, 1), parameter(8), norm(), parameter(8, 8, 1, 1), parameter(8))
    arguments += (norm(), parameter(8, 8, 1, 1), parameter(8), parameter(3, 4, 1, 1), parameter(3))
    x = torch.randn(3, 5, 6, 9, device=DEVICE).to(dtype).requires_grad_()
    theirs = fp64((x, *arguments))
    with sf.use_backend("triton"), poisoned_memory():
        actual = value_and_grads(functional.fourier_mix, (x, *arguments), training=training)
    assert_close(actual, value_and_grads(reference.fourier_mix, theirs, training=training), dtype)


@pytest.mark.parametrize(
    ("kernel", "output", "check"),
    [
        ("spectrum_mix_kernel", 3, test_several_tiles),
        ("spectrum_mix_backward_kernel", 4, lambda: test_mix_backward((5, 4, 3), (6, 7))),
        ("spectrum_parameters_kernel", 4, lambda: test_mix_backward((5, 4, 3), (6, 7))),
        ("spectrum_moments_kernel", 1, lambda: test_moments(5)),
        ("spectrum_moments_backward_kernel", 3, lambda: test_moments_backward((5, 7))),
        ("sum_partials_kernel", 1, lambda: test_moments(5)),
    ],
)
def test_zeroed_kernel_fails(
    kernel: str, output: int, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fourier if hasattr(fourier, kernel) else common, kernel, Zeroing(output))
    with pytest.raises(AssertionError):
        check()
