"""fourier_mix: transforms, widths, statistics, modules. What every op keeps is in test_contract.py."""

import copy
import itertools
import operator
from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
    SIZES,
    assert_close,
    assert_matches,
    fp64,
    num_threads,
    poisoned_memory,
    rel_rms,
    value_and_grads,
    with_field,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import swformer_fast as sf
from swformer_fast import functional, reference
from swformer_fast.modules import FourierBranch
from swformer_fast.parameters import Factor, FourierParameters, Norm, flatten

BACKENDS = [name for name in ("reference", "cpp") if sf.backends()[name] == "available"]
KERNELS = [name for name in BACKENDS if name != "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with sf.use_backend(request.param):
        yield request.param


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Any:
    with sf.use_backend(request.param):
        yield request.param


def parameters(
    dim: int, inner: int, outputs: int, dtype: torch.dtype = torch.float32, running: bool = True
) -> FourierParameters:
    def parameter(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=dtype) * 0.5).requires_grad_()

    def norm() -> Norm:
        statistics = (torch.randn(2 * inner, dtype=dtype), torch.rand(2 * inner, dtype=dtype) + 0.5)
        return Norm(*(statistics if running else (None, None)), parameter(2 * inner), parameter(2 * inner))

    def conv(out: int, channels: int) -> tuple[Tensor, Tensor]:
        return parameter(out, channels, 1, 1), parameter(out)

    in_weight, in_bias = conv(2 * inner, dim)
    # It reaches the zero frequency alone, sqrt(H * W) times as large: where that saturates the gate, fp32 cannot
    # resolve the gradient, in the reference either.
    in_bias.detach().mul_(0.05)
    gate, value = (Factor(norm(), *conv(2 * inner, 2 * inner)) for _ in range(2))
    return FourierParameters(in_weight, in_bias, gate, value, *conv(outputs, inner))


def image(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", mean: float = 0.0) -> Tensor:
    return LAYOUTS[layout]((torch.randn(shape) + mean).to(dtype)).requires_grad_()


def check(x: Tensor, bundle: FourierParameters, grad: Tensor | None = None, **options: Any) -> None:
    """Output, gradients and running statistics; the reference's are in fp64."""
    mine, theirs = (x, bundle), fp64((x, bundle))
    with poisoned_memory():
        actual = value_and_grads(functional.fourier_mix, mine, grad, **options)
    expected = value_and_grads(reference.fourier_mix, theirs, grad, **options)
    assert actual[0].dtype == x.dtype
    assert_close(actual, expected, x.dtype)
    for ours, expected_factor in zip(bundle.factors, theirs[1].factors, strict=True):
        assert_close(ours.norm[:2], expected_factor.norm[:2], what="running statistics")


def half_spectrum(blocks: Tensor, height: int, width: int) -> Tensor:
    """What `rfft2` returns (csrc/swformer/cpu/spectrum.h), as torch.fft.rfft2 returns it."""
    z = torch.complex(*blocks.unbind(3))
    columns, lanes = (width + 1) // 2, z.shape[3]
    groups = -(-columns // lanes)
    columns_of = z[:, :, : groups * height].unflatten(2, (groups, height)).transpose(2, 3).flatten(3)[..., :columns]
    nyquist = z[:, :, groups * height :].flatten(2)[..., :height, None]
    return columns_of if width % 2 else torch.cat((columns_of, nyquist), 3)


def blocks_of(z: Tensor, like: Tensor, width: int) -> Tensor:
    """The reverse, in the shape of `like`; NaN in the lanes of no meaning."""
    height, lanes = z.shape[2], like.shape[4]
    columns = (width + 1) // 2
    padded = nn.functional.pad(torch.view_as_real(z[..., :columns]), (0, 0, 0, -columns % lanes), value=torch.nan)
    parts = [padded.unflatten(3, (-1, lanes)).movedim(3, 2).flatten(2, 3)]
    if width % 2 == 0:
        nyquist = nn.functional.pad(torch.view_as_real(z[..., columns]), (0, 0, 0, -height % lanes), value=torch.nan)
        parts.append(nyquist.unflatten(2, (-1, lanes)))
    return torch.cat(parts, 2).transpose(3, 4).contiguous().view_as(like)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size",
    [
        *((1, 1), (1, 2), (2, 1), (2, 2), (4, 6), (8, 8), (16, 32), (32, 17), (33, 34), (12, 1250)),
        *((29, 62), (31, 19), (64, 64), (7, 512), (256, 48), (2048, 6), (1, 4096)),
        *((37, 8), (20, 67), (74, 82), (5, 2 * 127)),  # prime factors beyond the butterflies'
    ],
)
def test_transforms(size: tuple[int, int], dtype: torch.dtype) -> None:
    kernels = torch.ops._swformer_fast
    x, bias = (torch.randn(2, 3, *size) + 2).to(dtype), torch.randn(3)
    z = kernels.rfft2(x)
    actual, expected = half_spectrum(z, *size), torch.fft.rfft2(x.double(), norm="ortho")
    assert rel_rms(actual[..., 0, 0].real, expected[..., 0, 0].real) < 2e-7
    for spectrum in (actual, expected):
        spectrum[..., 0, 0] = 0  # its rounding errors must not spread over the others
    assert rel_rms(torch.view_as_real(actual), torch.view_as_real(expected)) < 4e-7
    spectrum = torch.randn_like(expected)  # not Hermitian where a real image's would be
    y = kernels.irfft2(blocks_of(spectrum.to(torch.complex64), z, size[1]), bias, x)
    assert y.dtype == dtype
    expected = torch.fft.irfft2(spectrum, s=size, norm="ortho") + bias.double()[:, None, None]
    assert rel_rms(y, expected) < (4e-7 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("size", [*SIZES, (2, 1), (3, 1), (1, 2), (31, 37), (4, 97)])
@pytest.mark.parametrize("training", [False, True])
def test_matches_reference(kernels: str, size: tuple[int, int], training: bool) -> None:
    if training and size == (1, 1):
        pytest.skip("without frequencies beside zero the first bias has no gradient but rounding errors")
    # Where no frequency has an imaginary part its variance is 0: eps alone bounds the gradients before they drop out.
    eps = 0.1 if max(size) <= 2 else 1e-5
    check(image(2 if size[0] * size[1] > 16 else 12, 5, *size), parameters(5, 4, 3), training=training, eps=eps)


@pytest.mark.parametrize(
    "dims", [(1, 1, 1), (2, 1, 2), (3, 5, 7), (16, 16, 16), (17, 9, 33), (40, 40, 40), (64, 64, 64)]
)
@pytest.mark.parametrize("training", [False, True])
def test_widths(kernels: str, dims: tuple[int, int, int], training: bool) -> None:
    if training and dims[1] == 1:
        pytest.skip("normalisation cancels the gradients of a single channel's weights down to rounding errors")
    check(image(2, dims[0], 14, 23), parameters(*dims), training=training)


@pytest.mark.parametrize("training", [False, True])
def test_no_last_convolution(kernels: str, training: bool) -> None:
    check(image(2, 5, 14, 23), parameters(5, 7, 3)._replace(out_weight=None, out_bias=None), training=training)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_more_tiles_than_one_task(kernels: str, batch: int, training: bool) -> None:
    check(image(batch, 8, 96, 130), parameters(8, 8, 8), training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_layouts_and_dtypes(kernels: str, layout: str, dtype: torch.dtype, training: bool) -> None:
    x = image(3, 6, 19, 22, dtype=dtype, layout=layout)
    check(x, parameters(6, 6, 6), training=training)
    y = functional.fourier_mix(x, parameters(6, 6, 6), training)
    last = layout == "channels_last"
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_fp64_runs_on_the_reference() -> None:
    arguments = (image(2, 3, 9, 8, dtype=torch.float64), parameters(3, 3, 3, torch.float64))
    assert "no float64" in sf.why_not("fourier_mix", *arguments)
    assert_matches(functional.fourier_mix, reference.fourier_mix, arguments)


@pytest.mark.parametrize("training", [False, True])
def test_batch_statistics_without_running_ones(backend: str, training: bool) -> None:
    check(image(2, 3, 8, 9), parameters(3, 3, 3, running=False), training=training)


def test_images_of_positive_mean(kernels: str) -> None:
    """The zero frequency holds nearly all of such an image; moments that include it lose the rest."""
    check((torch.rand(1, 8, 96, 96) + 0.5).requires_grad_(), parameters(8, 8, 8), training=True)


@pytest.mark.parametrize("training", [False, True])
def test_a_large_mean_stays_finite(kernels: str, training: bool) -> None:
    x = image(1, 4, 1024, 1024, mean=1e3)
    bundle = parameters(4, 4, 4)
    y, grads = value_and_grads(functional.fourier_mix, (x, bundle), training=training)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    expected = reference.fourier_mix(*fp64((x, bundle)), training).detach()
    eager = reference.fourier_mix(x, bundle, training).detach()
    assert rel_rms(y, expected) < max(5e-6, 2 * rel_rms(eager, expected))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("training", [False, True])
def test_inf_and_nan_propagate(backend: str, value: float, training: bool) -> None:
    bundle = parameters(3, 3, 3)
    x = torch.randn(2, 3, 6, 7)
    x[0, 1, 2, 3] = value
    y = functional.fourier_mix(x, bundle, training)
    expected = reference.fourier_mix(x, bundle, training)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.allclose(y, expected, equal_nan=True, atol=1e-4)
    bundle = parameters(3, 3, 3)
    bundle.out_bias.detach()[1] = value
    y = functional.fourier_mix(torch.randn(1, 3, 6, 7), bundle)
    assert torch.equal(y.isfinite()[0, :, 0, 0], torch.tensor([True, False, True]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mean", [3.0, 20.0, 100.0])
def test_as_exact_as_pytorch_where_the_mean_is_large(kernels: str, mean: float, training: bool) -> None:
    """Nearly all of such an image is in its zero frequency, and normalisation takes nearly all of that away again."""
    arguments = (image(1, 8, 32, 34, mean=mean), parameters(8, 8, 8))

    def run(function: Any, arguments: Any) -> list[Tensor]:
        return tree_leaves(value_and_grads(function, arguments, training=training, momentum=0.0))

    exact = run(reference.fourier_mix, fp64(arguments))
    for mine, theirs, e in zip(*(run(p.fourier_mix, arguments) for p in (functional, reference)), exact, strict=True):
        assert rel_rms(mine, e) <= max(2e-6, rel_rms(theirs, e))


@pytest.mark.parametrize("backend", KERNELS)
def test_running_statistics_in_half_precision(backend: str) -> None:
    """A batch's variance, here beyond fp16's range, takes the momentum first."""
    x, mine = image(2, 3, 8, 9, dtype=torch.float16), parameters(3, 4, 5, torch.float16)
    mine = tree_map(torch.detach, mine._replace(in_weight=400 * mine.in_weight))
    theirs = fp64(mine)
    with sf.use_backend(backend):
        functional.fourier_mix(x, mine, training=True, momentum=0.01)
    reference.fourier_mix(x.double(), theirs, training=True, momentum=0.01)
    for ours, expected in zip(mine.factors, theirs.factors, strict=True):
        assert expected.norm.running_var.max() > 660  # of 65504 at most, a hundredth each
        assert_close(ours.norm[:2], expected.norm[:2], torch.float16)


@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(backend: str, training: bool) -> None:
    branch = FourierBranch(3).train(training)
    before = {name: tensor.clone() for name, tensor in branch.state_dict().items() if "running" in name}
    x = torch.randn(0, 3, 7, 8, requires_grad=True)
    y = branch(x)
    y.sum().backward()
    assert y.shape == (0, 3, 7, 8)
    assert x.grad is not None
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in branch.parameters())
    assert all(torch.equal(branch.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("needs", [("x",), ("in_weight",), ("x", "gate.weight"), ("out_bias",), ()])
@pytest.mark.parametrize("training", [False, True])
def test_partial_gradients(backend: str, needs: tuple[str, ...], training: bool) -> None:
    arguments = tree_map(torch.detach, (image(2, 3, 9, 10), parameters(3, 3, 3)))
    for name in needs:
        (arguments[0] if name == "x" else operator.attrgetter(name)(arguments[1])).requires_grad_()
    y = functional.fourier_mix(*arguments, training, 0.0)
    assert y.requires_grad == bool(needs)
    if needs:
        actual = value_and_grads(functional.fourier_mix, arguments, training=training, momentum=0.0)
        expected = value_and_grads(reference.fourier_mix, fp64(arguments), training=training, momentum=0.0)
        assert_close(actual, expected, torch.float32)


def modules(dim: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    mine, theirs = FourierBranch(dim, **options), reference.FourierBranch(dim, **options)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2) if name.endswith("running_var") else tensor.normal_(0, 0.5)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs.double()


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_module_through_training_and_evaluation(backend: str, momentum: float | None, track: bool) -> None:
    mine, theirs = modules(3, momentum=momentum, track_running_stats=track, eps=1e-3)
    for step, training in enumerate((True, True, False, True, False)):
        mine.train(training)
        theirs.train(training)
        x = torch.randn(2, 3, 11, 14) + step
        assert_close(mine(x), theirs(x.double()), torch.float32)
        for (name, tensor), other in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert rel_rms(tensor, other) < 5e-6, name


def test_module_of_the_other_layout_runs_the_reference() -> None:
    mine, theirs = modules(3, layout="concatenated")
    x = torch.randn(1, 3, 6, 7)
    assert_close(mine(x), theirs(x.double()), torch.float32)


@pytest.mark.parametrize("training", [False, True])
def test_frozen_normalisation(kernels: str, training: bool) -> None:
    mine, theirs = modules(3)
    for module in itertools.chain(mine.modules(), theirs.modules()):
        module.train(training and not isinstance(module, nn.BatchNorm2d))
    x = torch.randn(2, 3, 6, 7)
    assert_close(mine(x), theirs(x.double()), torch.float32)
    assert torch.equal(mine.gate_bn.running_mean, theirs.gate_bn.running_mean.float())


@pytest.mark.parametrize("channels", [8, 17, 24, 40, 48, 64])
@pytest.mark.parametrize("training", [False, True])
def test_bits_do_not_depend_on_threads(kernels: str, channels: int, training: bool) -> None:
    """At widths of the presets and between them; running statistics too."""
    x, p = image(2, channels, 24, 26), parameters(channels, channels, channels)

    def run() -> list[Tensor]:
        mine = tree_map(lambda t: t.detach().clone().requires_grad_(t.requires_grad), p)
        results = value_and_grads(functional.fourier_mix, (x, mine), training=training, momentum=0.5)
        statistics = [t for f in mine.factors for t in (f.norm.running_mean, f.norm.running_var)]
        return [*tree_leaves(results), *statistics]

    first = run()
    for threads in (1, 2, 3, 4, 8):
        with num_threads(threads):
            again = run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_double_backward(kernels: str, training: bool) -> None:
    def penalty(fn: Any, arguments: tuple) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(arguments) if leaf.requires_grad]
        y = fn(*arguments, training=training, momentum=0.0)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    arguments = (image(2, 3, 7, 8), parameters(3, 3, 3))
    in_fp64 = fp64(arguments)
    for actual, expected in zip(
        penalty(functional.fourier_mix, arguments), penalty(reference.fourier_mix, in_fp64), strict=True
    ):
        assert rel_rms(actual, expected) < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(backend: str, training: bool) -> None:
    torch._dynamo.reset()
    mine, _ = modules(3)
    mine.train(training)
    twin = copy.deepcopy(mine)
    x = torch.randn(2, 3, 9, 12, requires_grad=True)
    for module, run in (
        (mine, torch.compile(lambda x: mine(x.sin()).cos(), fullgraph=True)),
        (twin, lambda x: twin(x.sin()).cos()),
    ):
        run(x).square().sum().backward()
        module.gradient, x.grad = x.grad, None
    assert_close(mine.gradient, twin.gradient)
    assert_close([p.grad for p in mine.parameters()], [p.grad for p in twin.parameters()])
    assert_close(
        [b for b in mine.buffers() if b.is_floating_point()], [b for b in twin.buffers() if b.is_floating_point()]
    )
    assert mine.gate_bn.num_batches_tracked == twin.gate_bn.num_batches_tracked == int(training)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(kernels: str, training: bool) -> None:
    mine, theirs = modules(4)
    mine.train(training)
    theirs.train(training)
    x = torch.randn(2, 4, 9, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mine(x)
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert mine.gate_conv.weight.grad.dtype == torch.float32
    assert rel_rms(y, theirs(x.bfloat16().double())) < 1e-2


def test_backward_keeps_the_inputs_only() -> None:
    branch = FourierBranch(8)
    x, sizes = torch.randn(1, 8, 32, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        branch(x)
    inputs = [x, *branch.parameters()]
    assert sum(sizes) <= sum(t.numel() * t.element_size() for t in inputs) + 2 * 8 * 9 * 8


@pytest.mark.parametrize(
    ("error", "message", "name", "value"),
    [
        (
            ValueError,
            r"in_weight must have shape \(6, 3, 1, 1\), got \(6, 4, 1, 1\)",
            "in_weight",
            torch.ones(6, 4, 1, 1),
        ),
        (ValueError, r"in_weight must have shape \(2 . C, 3, 1, 1\), got \(5, 3", "in_weight", torch.ones(5, 3, 1, 1)),
        (TypeError, "in_bias must be a torch.Tensor, got NoneType", "in_bias", None),
        (TypeError, r"gate must be a .*Factor \(norm, weight, bias\), got tuple", "gate", (None, None, None)),
        (
            TypeError,
            r"gate.norm must be a .*Norm \(running_mean, running_var, .*, got tuple",
            "gate.norm",
            (None, None),
        ),
        (ValueError, "gate.norm.weight must have shape", "gate.norm.weight", torch.ones(5)),
        (ValueError, "value.norm.running_var must have shape", "value.norm.running_var", torch.ones(5)),
        (
            ValueError,
            "must both have running statistics, or neither",
            "gate.norm",
            Norm(None, None, torch.ones(6), torch.ones(6)),
        ),
        (ValueError, "must both have running statistics, or neither", "value.norm.running_mean", None),
        (ValueError, "gate.weight must have shape", "gate.weight", torch.ones(6, 5, 1, 1)),
        (TypeError, "value.bias must have the dtype of the image", "value.bias", torch.ones(6, dtype=torch.float64)),
        (ValueError, "out_weight must have shape", "out_weight", torch.ones(3, 4, 1, 1)),
        (ValueError, "out_bias must have shape", "out_bias", torch.ones(4)),
    ],
)
def test_errors(error: type[Exception], message: str, name: str, value: Any) -> None:
    with pytest.raises(error, match=message):
        functional.fourier_mix(torch.randn(1, 3, 4, 5), with_field(parameters(3, 3, 3), name, value))


def test_parameters_must_be_a_bundle() -> None:
    with pytest.raises(TypeError, match=r"parameters must be a .*FourierParameters \(in_weight, .*, got tuple"):
        functional.fourier_mix(torch.randn(1, 3, 4, 5), flatten(parameters(3, 3, 3)))


def test_one_value_per_channel_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FourierBranch(2)(torch.randn(1, 2, 1, 1))
    assert FourierBranch(2).eval()(torch.randn(1, 2, 1, 1)).shape == (1, 2, 1, 1)


@pytest.mark.parametrize(
    "options", [{"eps": -1.0}, {"eps": float("nan")}, {"momentum": float("inf")}, {"momentum": None}]
)
def test_options_that_are_no_finite_numbers(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))} must be a (finite|real) number"):
        functional.fourier_mix(torch.randn(1, 3, 4, 5), parameters(3, 3, 3), **options)
