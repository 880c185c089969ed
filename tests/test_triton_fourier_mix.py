"""The Triton kernels of the Fourier branch against plain PyTorch in fp64, interpreted unless there is a GPU."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, fp64, poisoned_memory, rel_rms, tf32, value_and_grads, zero_kernel
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference
from swformer_fast.parameters import Factor, FourierParameters, Norm, flatten, unflatten

spectra = pytest.importorskip("swformer_kernels._spectrum", reason="triton is not installed")
algebra = pytest.importorskip("swformer_kernels._algebra")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = [(5, 4, 3), (1, 1, 1), (17, 33, 9), (40, 40, 40), (6, 19, 0)]


def _spectrum(batch: int, channels: int, height: int, width: int) -> Tensor:
    x = torch.randn(batch, channels, height, width, device=DEVICE)
    return torch.view_as_real(torch.fft.rfft2(x, norm="ortho")).contiguous()


Parameters = tuple[Tensor, Tensor | None, Tensor | None]


def _parameters(dim: int, inner: int, outputs: int) -> Parameters:
    """Matrix, last weight and its bias; neither of these two where there are 0 outputs."""
    matrix = torch.randn(4 * inner, 2 * (dim + 1), device=DEVICE) / (2 * dim) ** 0.5
    if not outputs:
        return matrix, None, None
    return matrix, torch.randn(outputs, inner, device=DEVICE) / inner**0.5, torch.randn(outputs, device=DEVICE)


def _mix(spectrum: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    """The definition in the docstring of `spectrum_mix`."""
    parts = spectrum.movedim(-1, 1)
    constants = torch.zeros_like(parts[:, :, :1])
    constants[:, 0], constants[:, 1, :, 0, 0] = 1, 1
    columns = torch.cat((parts, constants), 2).flatten(1, 2)
    gate, value = torch.einsum("ij,bjhw->bihw", matrix, columns).chunk(2, 1)
    y = scale * (torch.sigmoid(gate) * F.gelu(value)).unflatten(1, (2, -1))
    if weight is None or bias is None:
        return torch.einsum("brchw->bchwr", y)
    y = torch.einsum("ec,brchw->behwr", weight, y)
    at_zero = torch.zeros_like(y)
    at_zero[:, :, 0, 0, 0] = 1
    return y + bias[:, None, None, None] * at_zero


def _image_of(spectrum: Tensor, height: int, width: int) -> Tensor:
    return torch.fft.irfft2(torch.view_as_complex(spectrum.contiguous()), s=(height, width), norm="ortho")


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (6, 7)])
def test_mix(dims: tuple[int, int, int], size: tuple[int, int]) -> None:
    spectrum, parameters = _spectrum(2, dims[0], *size), _parameters(*dims)
    with poisoned_memory():
        actual = spectra.spectrum_mix(spectrum, *parameters, size[1], 0.3)
    assert_close(actual, _mix(*fp64((spectrum, *parameters)), 0.3))


def test_error_of_tf32() -> None:
    """Why tf32 is on request only."""
    tensors = (_spectrum(1, 40, 16, 16), *_parameters(40, 40, 40))
    exact = _mix(*fp64(tensors))

    def error(precision: Callable[[Tensor], Tensor]) -> float:
        return rel_rms(_mix(*fp64([*map(precision, tensors[:3]), tensors[3]])), exact)

    assert 1e-4 < error(tf32) < 1e-3
    assert error(lambda x: tf32(x) + tf32(x - tf32(x))) < 1e-6


def test_several_tiles() -> None:
    spectrum, parameters = _spectrum(2, 3, 9, 20), _parameters(3, 4, 5)
    assert_close(spectra.spectrum_mix(spectrum, *parameters, 20), _mix(*fp64((spectrum, *parameters))))


def test_three_tf32_products() -> None:
    """They give what "ieee" gives, forward and backward."""
    spectrum, parameters, grad = _spectrum(1, 17, 5, 8), _parameters(17, 20, 9), _spectrum(1, 9, 5, 8)

    def results(precision: str) -> tuple[Tensor, ...]:
        mixed = spectra.spectrum_mix(spectrum, *parameters, 8, 0.3, precision)
        return mixed, *spectra.spectrum_mix_backward(grad, spectrum, *parameters, 8, 0.3, True, True, precision)

    assert_close(results("tf32x3"), results("ieee"))


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (1, 2)])
def test_mix_backward(dims: tuple[int, int, int], size: tuple[int, int]) -> None:
    """Gradients of an image made from an image, through both transforms."""
    x = torch.randn(2, dims[0], *size, device=DEVICE)
    parameters = _parameters(*dims)

    def mixed(x: Tensor, *parameters: Tensor | None) -> Tensor:
        spectrum = torch.view_as_real(torch.fft.rfft2(x, norm="ortho"))
        return _image_of(_mix(spectrum, *parameters, 0.3), *size)

    # Partly the image itself: of one channel a weight's gradient is one sum, which must not cancel.
    grad = mixed(x, *parameters) + 0.3 * torch.randn(2, dims[2] or dims[1], *size, device=DEVICE)
    inputs = [None if t is None else t.double().requires_grad_() for t in (x, *parameters)]
    leaves = [t for t in inputs if t is not None]
    expected = torch.autograd.grad(mixed(*inputs), leaves, grad.double())
    spectrum, grad_spectrum = (torch.view_as_real(torch.fft.rfft2(t, norm="ortho")).contiguous() for t in (x, grad))
    with poisoned_memory():
        grads = spectra.spectrum_mix_backward(grad_spectrum, spectrum, *parameters, size[1], 0.3, True, True)
    assert_close((_image_of(grads[0], *size), *(g for g in grads[1:] if g.numel())), expected, torch.float32)


def test_only_what_is_needed() -> None:
    spectrum, parameters = _spectrum(1, 3, 4, 6), _parameters(3, 4, 5)
    grad = _spectrum(1, 5, 4, 6)
    full = spectra.spectrum_mix_backward(grad, spectrum, *parameters, 6, 1.0, True, True)
    only_spectrum = spectra.spectrum_mix_backward(grad, spectrum, *parameters, 6, 1.0, True, False)
    only_parameters = spectra.spectrum_mix_backward(grad, spectrum, *parameters, 6, 1.0, False, True)
    assert [g.numel() for g in only_spectrum[1:]] == [0, 0, 0]
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
        actual = spectra.spectrum_moments(spectrum, 0.3)
    assert actual.dtype == torch.float64
    assert_close(actual, _moments(0.3 * spectrum.double()), torch.float32)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_moments_backward(size: tuple[int, int]) -> None:
    """The gradient of an image through quadratic forms in its spectrum, linear ones, and its zero frequency."""
    x, grad = torch.randn(2, 2, 5, *size, device=DEVICE)
    product = torch.randn(5, 2 * 6 + 2, device=DEVICE)
    first, second, at_zero = product.double().split((6, 6, 2), 1)
    first, second = (torch.cat(((p[:, :5] + p[:, :5].T) / 2, p[:, 5:]), 1) for p in (first, second))
    product[:, :6], product[:, 6:12] = first, second
    leaf = x.double().requires_grad_()
    spectrum = torch.view_as_real(torch.fft.rfft2(leaf, norm="ortho"))
    moments, linear = _moments(spectrum), (spectrum[:, :, 0, 0, 0].T * at_zero).sum()
    for part, form in zip(moments, (first, second), strict=True):
        linear = linear + (part[:, :5] * form[:, :5]).sum() / 2 + (part[:, 5] * form[:, 5]).sum()
    (expected,) = torch.autograd.grad(linear, leaf)
    spectrum, grad_spectrum = (torch.view_as_real(torch.fft.rfft2(t, norm="ortho")).contiguous() for t in (x, grad))
    with poisoned_memory():
        actual = spectra.spectrum_moments_backward(grad_spectrum, spectrum, product, size[1])
    assert_close(_image_of(actual, *size), grad.double() + expected, torch.float32)


EPS, SIZE = 1e-3, (6, 9)


def _factors(dim: int, inner: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The first fourteen parameters of the op."""

    def norm() -> tuple[Tensor, ...]:
        statistics = (torch.randn(2 * inner), torch.rand(2 * inner) + 0.5)
        return (*statistics, torch.randn(2 * inner), torch.randn(2 * inner), torch.randn(2 * inner, 2 * inner))

    parameters = (torch.randn(2 * inner, dim), torch.randn(2 * inner))
    parameters += (*norm(), torch.randn(2 * inner), *norm(), torch.randn(2 * inner))
    return tuple(p.to(DEVICE, dtype) for p in parameters)


def _statistics_input(dim: int, mean: float) -> tuple[Tensor, Tensor]:
    """The unscaled spectrum of three images, and the moments of the scaled one."""
    x = torch.randn(3, dim, *SIZE, device=DEVICE) + mean
    spectrum = torch.view_as_real(torch.fft.rfft2(x)).contiguous()
    return spectrum, _moments(spectrum.double() / math.prod(SIZE) ** 0.5)


Tensors = tuple[Tensor, ...]


def _batch_statistics(
    weight: Tensor, bias: Tensor, moments: Tensor, zero: Tensor, side: float, count: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of both factors' inputs, from the moments and the zero frequency of x's spectrum."""
    batch, dim = zero.shape
    others = count - batch
    real = zero @ weight.T + bias * side
    at_zero = torch.stack((real, torch.zeros_like(real)))
    sums, gram = moments[..., dim] @ weight.T, moments[..., :dim]
    spread = (weight @ gram * weight).sum(2) - sums.square() / others
    mean = (sums + at_zero.sum(1)) / count
    shift = others * (sums / others - mean).square() + (at_zero - mean.unsqueeze(1)).square().sum(1)
    return mean.T.flatten(), ((spread + shift) / count).T.flatten()


def _half(side: float, in_weight: Tensor, in_bias: Tensor, factor: Factor) -> Tensor:
    """A factor's half of the matrix: convolution, normalisation and convolution in one."""
    channels, (mean, variance, scale, shift) = len(in_bias), factor.norm
    slope = scale * (variance + EPS).rsqrt()
    mixing = (factor.weight * slope).view(channels, 2, channels, 2).permute(1, 0, 3, 2)
    constant = (factor.weight @ (shift - mean * slope) + factor.bias).view(channels, 2).T
    last = torch.stack((constant, mixing[:, :, 0] @ in_bias * side), 2)
    return torch.cat((mixing @ in_weight, last.unsqueeze(3)), 3).flatten(2).flatten(0, 1)


def _defined(
    parameters: Tensors, spectrum: Tensor, moments: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Matrix and statistics in fp64, and their leaves: parameters, then moments and zero frequency."""
    side = math.prod(SIZE) ** 0.5
    leaves = [p.double().requires_grad_() for p in parameters]
    bundle = unflatten(FourierParameters, [*leaves, None, None])
    factors, spectral = bundle.factors, []
    count = spectrum.shape[0] * spectrum.shape[2] * spectrum.shape[3]
    if moments is not None:
        spectral = [moments.clone().requires_grad_(), (spectrum[:, :, 0, 0, 0].double() / side).requires_grad_()]
        batch = zip(*(t.chunk(2) for t in _batch_statistics(*leaves[:2], *spectral, side, count)), strict=True)
        factors = [f._replace(norm=Norm(*of_f, *f.norm[2:])) for f, of_f in zip(factors, batch, strict=True)]
    halves = zip(leaves[0].chunk(2), leaves[1].chunk(2), factors, strict=True)
    matrix = torch.cat([_half(side, *half) for half in halves])
    statistics = [t for f in factors for t in f.norm[:2]]
    scale = torch.full((matrix.shape[1] // 2,), 1 / side, dtype=torch.float64, device=DEVICE)
    scale[-1] = 1
    statistics = [s * count / (count - 1) if i % 2 else s for i, s in enumerate(statistics)]
    return (
        matrix * torch.cat((scale, scale)),
        statistics,
        [p for i, p in enumerate(leaves) if i not in (2, 3, 8, 9)] + spectral,
    )


def _check_compose(parameters: Tensors, spectrum: Tensor, moments: Tensor | None, dtype: torch.dtype) -> None:
    """The matrix, the statistics and every gradient, those of moments and zero frequency included."""
    area, dim = math.prod(SIZE), spectrum.shape[1]
    expected, statistics, leaves = _defined(parameters, spectrum, moments)
    with poisoned_memory():
        composed = algebra.compose(EPS, area, parameters, spectrum, moments, True)
    assert_close(composed.matrix, expected)
    grad = torch.randn_like(composed.matrix)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    with poisoned_memory():
        grads, product = algebra.compose_backward(grad, composed, EPS, area, parameters, spectrum, moments)
    assert [g.dtype for g in grads] == [p.dtype for i, p in enumerate(parameters) if i not in (2, 3, 8, 9)]
    assert_close(list(grads), list(wanted[:10]), dtype, "gradient")
    if moments is None:
        assert composed.statistics is None
        assert product is None
        return
    assert composed.statistics.dtype == torch.promote_types(parameters[4].dtype, torch.float32)
    assert_close(composed.statistics.unbind(), statistics, torch.float32, "statistics")
    of_moments, of_zero = wanted[10:]
    symmetric = of_moments[..., :dim] + of_moments[..., :dim].mT
    parts = [
        torch.cat((m / area, v[:, None] / area**0.5), 1) for m, v in zip(symmetric, of_moments[..., dim], strict=True)
    ]
    assert_close(product.split((dim + 1, dim + 1, 3), 1), [*parts, of_zero.T / area**0.5], torch.float32, "product")


@pytest.mark.parametrize("dims", [(5, 4), (2, 1), (17, 33), (40, 40)])
@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compose(dims: tuple[int, int], batch_statistics: bool, dtype: torch.dtype) -> None:
    spectrum, moments = _statistics_input(dims[0], 0.5)
    _check_compose(_factors(*dims, dtype), spectrum, moments if batch_statistics else None, dtype)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_compose_from_different_dtypes(batch_statistics: bool) -> None:
    parameters = list(_factors(5, 4))
    for place in (1, 4, 6, 13):
        parameters[place] = parameters[place].bfloat16()
    spectrum, moments = _statistics_input(5, 0.5)
    _check_compose(tuple(parameters), spectrum, moments if batch_statistics else None, torch.bfloat16)


def test_statistics_of_nearly_equal_channels() -> None:
    """What fp32 sums would lose: the variance of the small differences that the first convolution takes."""
    parameters = list(_factors(4, 3))
    parameters[0] = torch.tensor([[1.0, -1, 0, 0], [0, 1, -1, 0], [0, 0, 1, -1]], device=DEVICE).repeat(2, 1)
    x = torch.randn(3, 1, *SIZE, device=DEVICE) + 1e-4 * torch.randn(3, 4, *SIZE, device=DEVICE) + 100
    spectrum = torch.view_as_real(torch.fft.rfft2(x)).contiguous()
    moments = _moments(spectrum.double() / math.prod(SIZE) ** 0.5)
    statistics = algebra.compose(EPS, math.prod(SIZE), tuple(parameters), spectrum, moments).statistics
    assert_close(statistics.unbind(), _defined(tuple(parameters), spectrum, moments)[1], torch.float32)


def test_more_frequencies_than_fp32_counts() -> None:
    """A kernel's float arguments are fp32, unless it is interpreted."""
    parameters = tuple(p if i < 2 else p.double() for i, p in enumerate(_factors(1, 1)))
    spectrum = torch.zeros(1, device=DEVICE).expand(1, 1, 4097, 4097, 2)
    moments = torch.rand(2, 1, 2, dtype=torch.float64, device=DEVICE)
    statistics = algebra.compose(EPS, 4096**2, parameters, spectrum, moments).statistics
    weight, bias = (p.double().flatten() for p in parameters[:2])
    sums = torch.outer(weight, moments[:, 0, 1])
    sums[:, 0] += 4096 * bias
    torch.testing.assert_close(statistics[::2], sums / 4097**2, rtol=1e-12, atol=0)


def test_repeats_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_FREQUENCIES_A_PARTIAL", 32)
    spectrum, parameters, grad = _spectrum(2, 5, 8, 10), _parameters(5, 6, 7), _spectrum(2, 7, 8, 10)
    first, second = (
        (
            *spectra.spectrum_mix_backward(grad, spectrum, *parameters, 10, 1.0, True, True),
            spectra.spectrum_moments(spectrum),
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(first[4], _moments(spectrum.double()), torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_large_zero_frequency() -> None:
    spectrum, parameters = _spectrum(1, 4, 3, 4), _parameters(4, 4, 4)
    spectrum[:, :, 0, 0, 0] = torch.tensor([1e6, -1e6, 1e6, -1e6])
    actual = spectra.spectrum_mix(spectrum, *parameters, 4)
    assert actual.isfinite().all()
    assert_close(actual, _mix(*fp64((spectrum, *parameters))))


def _branch(dim: int, inner: int, outputs: int, dtype: torch.dtype = torch.float32) -> FourierParameters:
    """The parameters of `fourier_mix`; without the last convolution's where there are 0 outputs."""

    def parameter(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE) * 0.3).to(dtype).requires_grad_()

    def factor() -> Factor:
        statistics = torch.randn(parts, device=DEVICE).to(dtype), (torch.rand(parts, device=DEVICE) + 0.5).to(dtype)
        norm = Norm(*statistics, parameter(parts), parameter(parts))
        return Factor(norm, parameter(parts, parts, 1, 1), parameter(parts))

    parts = 2 * inner
    first = parameter(parts, dim, 1, 1), parameter(parts)
    last = (parameter(outputs, inner, 1, 1), parameter(outputs)) if outputs else (None, None)
    return FourierParameters(*first, factor(), factor(), *last)


def _check_branch(x: Tensor, parameters: FourierParameters, training: bool) -> None:
    """Output, gradients and running statistics of the op on this backend, against the reference."""
    mine, theirs = (x, parameters), fp64((x, parameters))
    with sf.use_backend("triton"), poisoned_memory():
        actual = value_and_grads(functional.fourier_mix, mine, training=training)
    assert_close(actual, value_and_grads(reference.fourier_mix, theirs, training=training), x.dtype)
    for ours, expected in zip(parameters.factors, theirs[1].factors, strict=True):
        assert_close(ours.norm[:2], expected.norm[:2], x.dtype, "running statistics")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [3, 0])
def test_whole_branch(dtype: torch.dtype, training: bool, outputs: int) -> None:
    x = torch.randn(3, 5, 6, 9, device=DEVICE).to(dtype).requires_grad_()
    _check_branch(x, _branch(5, 4, outputs), training)


def test_backward_under_autocast() -> None:
    """Autocast reaches none of the sums that the gradients are made of."""
    x, parameters = torch.randn(2, 5, 6, 9, device=DEVICE, requires_grad=True), _branch(5, 4, 3)
    leaves = [x] + [t for t in flatten(parameters) if t.requires_grad]
    with sf.use_backend("triton"):
        y = functional.fourier_mix(x, parameters, training=True)
        expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_images_of_positive_mean() -> None:
    """The zero frequency holds nearly all of such an image; moments that include it lose the rest."""
    _check_branch((torch.rand(1, 4, 24, 24, device=DEVICE) + 0.5).requires_grad_(), _branch(4, 4, 4), True)


@pytest.mark.parametrize(
    ("kernel", "output", "check"),
    [
        ("spectrum_mix_kernel", "out", test_several_tiles),
        ("spectrum_mix_backward_kernel", "out", lambda: test_mix_backward((5, 4, 3), (6, 7))),
        ("spectrum_parameters_kernel", "partials", lambda: test_mix_backward((5, 4, 3), (6, 7))),
        ("spectrum_moments_kernel", "partials", lambda: test_moments(5)),
        ("spectrum_moments_backward_kernel", "out", lambda: test_moments_backward((5, 7))),
        *(
            ("batch_statistics_kernel", output, lambda: test_compose((5, 4), True, torch.float32))
            for output in ("table", "statistics", "products", "zeros")
        ),
        ("compose_kernel", "out", lambda: test_compose((5, 4), False, torch.float32)),
        *(
            ("compose_backward_kernel", output, lambda: test_compose((5, 4), False, torch.float32))
            for output in ("weight_grad", "bias_grad", "gate_grads", "value_grads")
        ),
        ("compose_backward_kernel", "right", lambda: test_compose((5, 4), True, torch.float32)),
        ("sum_partials_kernel", "outputs", lambda: test_moments(5)),
    ],
)
def test_zeroed_kernel_fails(
    kernel: str, output: str, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    zero_kernel(monkeypatch, kernel, output)
    with pytest.raises(AssertionError):
        check()
