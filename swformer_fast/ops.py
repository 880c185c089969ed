"""The operators: schema, fake kernel, autograd and autocast of each. The only file that talks to torch.library.

Every op runs through `backend.run`, so one schema serves all backends; every backward is an op of its own, whose own
gradient (double backward) is taken through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _fourier, reference, self_test
from .backend import OPS, Op, run

NAMESPACE = "swformer_fast"
_LIB = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_AUTOGRAD_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
for _key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradFunctionality"):
    _AUTOGRAD_KEYS = _AUTOGRAD_KEYS | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


def channels_last(x: Tensor) -> bool:
    """Whether the backends write channels_last outputs for input `x` (the same test as csrc/common/tensor.h)."""
    return (
        x.dim() == 4 and x.shape[1] > 1 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )


def _empty(like: Tensor, *size: int) -> Tensor:
    """An output of this size, in the memory format that goes with input `like`."""
    layout = torch.channels_last if len(size) == 4 and channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _format(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory format in which the kernels write an output for input `like`."""
    return x.contiguous(
        memory_format=torch.channels_last if x.dim() == 4 and channels_last(like) else torch.contiguous_format
    )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_sums(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The same, called with one more flag, and after its first result, y, `y.sum((2, 3))`: empty without the flag."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        result = implementation(*args[:-1])
        y, *others = result if isinstance(result, tuple) else (result,)
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        sums = y.sum((2, 3), dtype=dtype) if args[-1] else y.new_empty(0, dtype=dtype)
        return y, sums, *others

    return call


def _returned(tensors: tuple[Tensor, ...]) -> Any:
    """What an op returns whose schema says so many."""
    return tensors if len(tensors) > 1 else tensors[0]


def _define(
    schema: str,
    family: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    limits: Callable[..., str | None],
    kernel: str = "",
    compose: Callable[..., Any] | None = None,
    sample: Callable[..., Any] | None = None,
) -> None:
    name = schema.split("(")[0]
    op = OPS[name] = Op(name, family, reference, limits, kernel, compose, sample)
    _LIB.define(schema, tags=_TAGS)
    _LIB.impl(name, lambda *args: run(op, args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)


def _cast_input_under_autocast(name: str) -> None:
    """Under autocast the first argument is cast to the autocast dtype; parameters are read in their own dtype."""
    op = getattr(torch.ops.swformer_fast, name)
    keys = {device: getattr(torch._C.DispatchKey, f"Autocast{device.upper()}") for device in ("cpu", "cuda")}

    def kernel(device: str) -> Callable[..., Any]:
        def cast_and_call(x: Tensor, *args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(keys[device])):
                return op(x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)), *args)

        return cast_and_call

    for device in keys:
        _LIB.impl(name, kernel(device), f"Autocast{device.upper()}")


def _register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """As torch.library.register_autograd; its generality takes longer than the kernels on small images."""
    op = getattr(torch.ops.swformer_fast, name).default
    below, any_requires_grad = torch._C._after_autograd_keyset, torch._C._any_requires_grad

    def redispatch(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            output = redispatch(keyset, args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return None, *backward(ctx, *grads)

    def dispatch(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return Gradient.apply(keyset, *args)
        return redispatch(keyset, args)

    _LIB.impl(name, dispatch, "Autograd", with_keyset=True)


@contextmanager
def _autograd() -> Iterator[None]:
    """Kernels of ops run below autograd; inside, autograd records."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD_KEYS), torch.enable_grad():
        yield


def _define_differentiable(
    schema: str,
    backward_arguments: str,
    family: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    limits: Callable[..., str | None],
    groups: Sequence[int],
    kept: Sequence[str] = (),
    residual: bool = False,
    sums: bool = False,
    kernels: tuple[str, Callable[..., Any], Callable[..., Any]] | None = None,
    products: bool = False,
) -> None:
    """An op, its op `NAME_backward(grad[, grad_sums], *kept, *inputs, *flags)` and the gradients of both.

    groups: for each input the flag (its place among `backward_arguments`) that asks for the gradient, -1 for inputs
    that have none. The backward op returns one gradient for each differentiable input, in order; what its flag does
    not ask for is empty. Of several outputs the first is differentiable; `kept` names those after it that the backward
    op takes. residual: whether one more input, the last and optional, is added to the output; the output's gradient is
    its own. sums: whether the second output, differentiable too, is the first one's sum over the pixels, (B, C), if one
    more input, the last, is true; `reference` and `fake` have neither. kernels: the name of a C++ kernel that must be
    there, and the two ops composed of C++ kernels, called as (kernels, *arguments), the backward where autograd
    records; by default the ops are kernels themselves. products: whether the Triton kernels hold matrix products, which
    are tested before their first use.
    """
    name, rest = schema.split("(", 1)
    inputs_schema = rest.rsplit(") ->", 1)[0].removesuffix(", Tensor? residual").removesuffix(", bool need_sums")
    count, outputs = len(groups), 1 + sums
    leading = outputs + len(kept)
    places = [i for i, group in enumerate(groups) if group >= 0]

    def gradients(
        output_grads: Sequence[Any], inputs: Sequence[Any], wanted: Sequence[int], create_graph: bool
    ) -> dict[int, Tensor]:
        output, grad = _first(reference(*inputs)), output_grads[0]
        for of_sums in output_grads[1:]:
            grad = grad if of_sums is None else grad + of_sums[..., None, None]
        tensors = [inputs[i] for i in wanted]
        grads = torch.autograd.grad(
            output, tensors, grad.to(output.dtype), create_graph=create_graph, allow_unused=True
        )
        return {i: torch.zeros_like(t) if g is None else g for i, t, g in zip(wanted, tensors, grads, strict=True)}

    def reference_backward(grad: Tensor, *args: Any) -> Any:
        output_grads, args = (grad, *args[: outputs - 1]), args[leading - 1 :]
        flags = args[count:]
        wanted = [i for i in places if flags[groups[i]] and args[i] is not None]
        with _autograd():
            inputs = [args[i].detach().requires_grad_() if i in wanted else args[i] for i in range(count)]
            grads = gradients(output_grads, inputs, wanted, False) if wanted else {}
        return _returned(tuple(_format(args[i], grads[i]) if i in grads else grad.new_empty(0) for i in places))

    def fake_backward(grad: Tensor, *args: Any) -> Any:
        args = args[leading - 1 :]
        flags = args[count:]
        empty = (
            _empty(args[i], *args[i].shape) if flags[groups[i]] and args[i] is not None else grad.new_empty(0)
            for i in places
        )
        return _returned(tuple(empty))

    def formatted(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result, like = implementation(*args), args[-count - residual - sums]
            return (_format(like, result[0]), *result[1:]) if isinstance(result, tuple) else _format(like, result)

        return call

    def composed_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
        def call(kernels: Any, *args: Any) -> tuple[Tensor, ...]:
            with _autograd():
                grads = backward(kernels, *args)
            inputs = args[leading:]
            return tuple(g if inputs[i] is None else _format(inputs[i], g) for i, g in zip(places, grads, strict=True))

        return call

    def sample(generator: torch.Generator, args: Sequence[Any]) -> tuple[Any, ...]:
        def one(arg: Any, group: int) -> Any:
            make = self_test.image if group == 0 else self_test.parameter
            return make(generator, arg) if isinstance(arg, Tensor) else arg

        return *map(one, args, groups), *(one(arg, 0) for arg in args[count:])

    def sample_backward(generator: torch.Generator, args: Sequence[Any]) -> tuple[Any, ...]:
        inputs = sample(generator, args[leading : leading + count])
        results = reference(*inputs)
        y, *others = results if isinstance(results, tuple) else (results,)
        grad = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        of_sums = (None if g is None else grad.mean((2, 3)) for g in args[1:outputs])
        return grad, *of_sums, *others[: len(kept)], *inputs, *(True for _ in args[leading + count :])

    kernel, composed, composed_back = kernels or ("", None, None)
    whole, whole_fake = (_with_sums(reference), _with_sums(fake)) if sums else (reference, fake)
    _define(
        schema,
        family,
        formatted(whole),
        whole_fake,
        limits,
        kernel,
        composed and formatted(composed),
        sample if products else None,
    )
    gradients_schema = ", ".join("Tensor" for _ in places)
    leading_schema = "Tensor grad, " + "Tensor? grad_sums, " * sums + "".join(f"Tensor {k}, " for k in kept)
    _define(
        f"{name}_backward({leading_schema}{inputs_schema}, {backward_arguments}) -> ({gradients_schema})",
        family,
        reference_backward,
        fake_backward,
        lambda backend, *args: limits(backend, *args[leading:][:count]),
        kernel,
        composed_back and composed_backward(composed_back),
        sample_backward if products else None,
    )
    backward_op = getattr(torch.ops.swformer_fast, f"{name}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(output[i] for i in range(outputs, leading)), *(inputs[i] for i in places))
        ctx.constants = [None if i in places else inputs[i] for i in range(count)]
        ctx.set_materialize_grads(False)  # the outputs after the first may have none
        if sums and not inputs[-1]:
            ctx.mark_non_differentiable(output[1])

    def restore(ctx: Any, saved: Sequence[Any]) -> list[Any]:
        inputs = list(ctx.constants)
        for i, tensor in zip(places, saved, strict=True):
            inputs[i] = tensor
        return inputs

    def backward(ctx: Any, *output_grads: Any) -> tuple[Any, ...]:
        grad, *of_sums = output_grads[:outputs]
        if all(g is None for g in (grad, *of_sums)):
            return (None,) * (count + residual + sums)
        needs = ctx.needs_input_grad[1:]
        flags = [any(needs[i] for i in places if groups[i] == flag) for flag in sorted({groups[i] for i in places})]
        saved = ctx.saved_tensors  # once: activation checkpointing forbids a second look
        result: list[Any] = [None] * count + [grad if needs[-1] else None] * residual + [None] * sums
        if not any(flags):
            return tuple(result)
        inputs = restore(ctx, saved[len(kept) :])
        if grad is None:
            grad = inputs[0].new_zeros(()).expand(*of_sums[0].shape, *inputs[0].shape[2:])
        grads = backward_op(grad, *of_sums, *saved[: len(kept)], *inputs, *flags)
        grads = grads if isinstance(grads, tuple) else (grads,)
        for i, g in zip(places, grads, strict=True):
            result[i] = g if needs[i] else None
        return tuple(result)

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        output_grads, inputs = inputs[:outputs], inputs[leading:]
        ctx.save_for_backward(*output_grads, *(inputs[i] for i in places))
        ctx.constants = [None if i in places else inputs[i] for i in range(count)]
        ctx.flags = inputs[count:]

    def double_backward(ctx: Any, *grad_grads: Tensor) -> tuple[Any, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views keep the path to the caller's graph, so that third derivatives are right as well.
            alive: list[Any] = [
                t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
                for t in ctx.saved_tensors
            ]
            inputs = restore(ctx, alive[outputs:])
            wanted = [i for i in places if ctx.flags[groups[i]] and inputs[i] is not None]
            first = gradients(alive[:outputs], inputs, wanted, True)
            given = dict(zip(places, grad_grads, strict=True))
            pairs = [(first[i], given[i].to(first[i].dtype)) for i in wanted if first[i].requires_grad]
            targets = [t for t in alive if t is not None]
            second = torch.autograd.grad(
                [f for f, _ in pairs], targets, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
            )
        found = iter(second)
        ordered = [None if t is None else next(found) for t in alive]
        result: list[Any] = [None] * (leading + count + len(ctx.flags))
        result[:outputs] = ordered[:outputs]
        for i, g in zip(places, ordered[outputs:], strict=True):
            result[leading + i] = g
        return tuple(result)

    _register_gradient(name, backward, save)
    _register_gradient(f"{name}_backward", double_backward, save_backward)
    _cast_input_under_autocast(name)


def _no_triton_fp64(backend: str, x: Tensor, *args: Any) -> str | None:
    return "the Triton kernels take no float64" if backend == "triton" and x.dtype == torch.float64 else None


# haar -----------------------------------------------------------------------------------------------------------------

_define_differentiable(
    "haar_dwt2d(Tensor x, Tensor dec_lo, Tensor dec_hi) -> Tensor",
    "bool need_x, bool need_filters",
    "haar",
    reference.haar_dwt2d,
    lambda x, dec_lo, dec_hi: _empty(x, x.shape[0], 4 * x.shape[1], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2),
    _no_triton_fp64,
    groups=(0, 1, 1),
)
_define_differentiable(
    "haar_idwt2d(Tensor y, Tensor rec_lo, Tensor rec_hi, int height, int width) -> Tensor",
    "bool need_y, bool need_filters",
    "haar",
    lambda y, rec_lo, rec_hi, height, width: reference.haar_idwt2d(y, rec_lo, rec_hi, (height, width)),
    lambda y, rec_lo, rec_hi, height, width: _empty(y, y.shape[0], y.shape[1] // 4, height, width),
    _no_triton_fp64,
    groups=(0, 1, 1, -1, -1),
)

# pointwise ------------------------------------------------------------------------------------------------------------


def _pointwise_limits(backend: str, *maps: Any) -> str | None:
    if any(isinstance(x, Tensor) and channels_last(x) for x in maps):
        return "the kernel writes contiguous maps, and one of these is channels_last"
    return _no_triton_fp64(backend, maps[0])


_define_differentiable(
    "pointwise(Tensor x0, Tensor? x1, Tensor? x2, Tensor weight, Tensor bias, Tensor? residual) -> Tensor",
    "bool need_x, bool need_params",
    "pointwise",
    reference.pointwise,
    lambda x0, x1, x2, weight, bias, residual: _empty(x0, x0.shape[0], weight.shape[1], *x0.shape[2:]),
    _pointwise_limits,
    groups=(0, 0, 0, 1, 1),
    residual=True,
    products=True,
)

# norm -----------------------------------------------------------------------------------------------------------------


def _statistics_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2, x.shape[1]), dtype=dtype), x.new_empty(x.shape[1], dtype=torch.float64)


_define_differentiable(
    "channel_statistics(Tensor x) -> (Tensor statistics, Tensor mean)",
    "bool need_x",
    "norm",
    reference.channel_statistics,
    _statistics_fake,
    _pointwise_limits,
    groups=(0,),
    kept=("mean",),
)

# fourier --------------------------------------------------------------------------------------------------------------


def _fourier_mix(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    in_weight, in_bias, *norms, out_weight, out_bias, eps = arguments
    own_statistics = norms[0] is None
    moments, statistics = _fourier.no_statistics(x, arguments[:-1])
    bns, convolutions = [], []
    for i, (mean, variance, scale, shift, weight, bias) in enumerate((norms[:6], norms[6:])):
        # With momentum 1 the running statistics become the batch's.
        running = tuple(statistics[2 * i : 2 * i + 2].unbind()) if own_statistics else (mean, variance)
        bns.append((*running, scale, shift))
        convolutions.append((weight, bias))
    y = reference.fourier_mix(
        x,
        in_weight,
        in_bias,
        bns[0],
        *convolutions[0],
        bns[1],
        *convolutions[1],
        out_weight,
        out_bias,
        own_statistics,
        1.0,
        eps,
    )
    if own_statistics and x.shape[0]:
        parts = torch.view_as_real(torch.fft.rfft2(x.detach().double(), norm="ortho")).permute(4, 1, 0, 2, 3)
        parts = torch.cat((parts, torch.ones_like(parts[:, :1])), 1)
        parts[..., 0, 0] = 0
        parts = parts.flatten(2)
        moments = parts[:, :-1] @ parts.mT
    return y, moments, statistics


def _fourier_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = _empty(x, x.shape[0], _fourier.output_channels(arguments[:-1]), x.shape[2], x.shape[3])
    return y, *_fourier.no_statistics(x, arguments[:-1])


_define_differentiable(
    "fourier_mix(Tensor x, Tensor in_weight, Tensor in_bias,"
    " Tensor? gate_mean, Tensor? gate_variance, Tensor gate_scale, Tensor gate_shift,"
    " Tensor gate_weight, Tensor gate_bias,"
    " Tensor? value_mean, Tensor? value_variance, Tensor value_scale, Tensor value_shift,"
    " Tensor value_weight, Tensor value_bias,"
    " Tensor? out_weight, Tensor? out_bias, float eps, bool need_sums)"
    " -> (Tensor y, Tensor sums, Tensor moments, Tensor statistics)",
    "bool need_x, bool need_parameters",
    "fourier",
    _fourier_mix,
    _fourier_fake,
    lambda backend, x, *args: "the kernels take no float64" if x.dtype == torch.float64 else None,
    groups=(0, 1, 1, -1, -1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1, 1, 1, -1),
    kept=("moments",),
    sums=True,
    kernels=("spectrum_mix", _fourier.mix, _fourier.mix_backward),
    products=True,
)

# wavelet --------------------------------------------------------------------------------------------------------------

_KERNEL_SIZES = {"cpp": (3, 5, 7), "triton": (3, 5)}


def _kernel_size_limits(backend: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    sizes = _KERNEL_SIZES[backend]
    if weight.shape[2] != weight.shape[3] or weight.shape[3] not in sizes:
        return f"kernels of {', '.join(f'{k} x {k}' for k in sizes)} only, got {weight.shape[2]} x {weight.shape[3]}"
    return _no_triton_fp64(backend, x)


_define_differentiable(
    "wavelet_mix(Tensor x, Tensor weight, Tensor bias, Tensor dec_lo, Tensor dec_hi, Tensor rec_lo, Tensor rec_hi,"
    " bool need_sums) -> (Tensor y, Tensor sums)",
    "bool need_x, bool need_params",
    "wavelet",
    reference.wavelet_mix,
    lambda x, *args: _empty(x, *x.shape),
    _kernel_size_limits,
    groups=(0, 1, 1, 1, 1, 1, 1),
    sums=True,
)

# spatial --------------------------------------------------------------------------------------------------------------


def _spatial_limits(backend: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    if backend == "triton" and weight.shape[3] != 3:
        return f"the Triton kernels take 3 x 3 only, got {weight.shape[2]} x {weight.shape[3]}"
    return _kernel_size_limits(backend, x, weight)


_define_differentiable(
    "depthwise_gelu(Tensor x, Tensor weight, Tensor bias, bool need_sums) -> (Tensor y, Tensor sums)",
    "bool need_x, bool need_params",
    "spatial",
    reference.depthwise_gelu,
    lambda x, *args: _empty(x, *x.shape),
    _spatial_limits,
    groups=(0, 1, 1),
    sums=True,
)

# mixer ----------------------------------------------------------------------------------------------------------------


def local_branches(
    x: Tensor, in_weight: Tensor, in_bias: Tensor, spatial_weight: Tensor, spatial_bias: Tensor, *wavelet: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The spatial and the wavelet branch of the halves of a 1x1 convolution of x, (2 * C, D): maps, then their sums."""
    ops = torch.ops.swformer_fast
    weights, biases = in_weight[None].chunk(2, 1), in_bias.chunk(2)

    def half(i: int) -> Tensor:
        return ops.pointwise(x, None, None, weights[i], biases[i], None)

    # One after the other: their inputs do not exist at a time.
    spatial, spatial_sums = ops.depthwise_gelu(half(0), spatial_weight, spatial_bias, True)
    mixed, wavelet_sums = ops.wavelet_mix(half(1), *wavelet, True)
    return spatial, mixed, spatial_sums, wavelet_sums


def _local_branches_fake(x: Tensor, in_weight: Tensor, in_bias: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    channels, dtype = rest[0].shape[0], torch.float64 if x.dtype == torch.float64 else torch.float32
    maps = (_empty(x, x.shape[0], channels, *x.shape[2:]) for _ in range(2))
    return *maps, *(x.new_empty(x.shape[0], channels, dtype=dtype) for _ in range(2))


def _local_branches_limits(backend: str, x: Tensor, *parameters: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.float64):
        return f"the kernel takes float32 and float64, not {x.dtype}"
    kernels = (_kernel_size_limits(backend, x, parameters[i]) for i in (2, 4))
    return _pointwise_limits(backend, x) or next((reason for reason in kernels if reason), None)


_define(
    "local_branches(Tensor x, Tensor in_weight, Tensor in_bias, Tensor spatial_weight, Tensor spatial_bias,"
    " Tensor wavelet_weight, Tensor wavelet_bias, Tensor dec_lo, Tensor dec_hi, Tensor rec_lo, Tensor rec_hi)"
    " -> (Tensor spatial, Tensor wavelet, Tensor spatial_sums, Tensor wavelet_sums)",
    "mixer",
    local_branches,
    _local_branches_fake,
    _local_branches_limits,
)

# ffn ------------------------------------------------------------------------------------------------------------------


def _multiscale_ffn(x: Tensor, in_weight: Tensor, in_bias: Tensor, *rest: Any) -> Tensor:
    depthwise, out_weight, out_bias, residual = rest[:6], rest[6], rest[7], rest[8] if len(rest) > 8 else None
    y = reference.multiscale_ffn(x, in_weight, in_bias, depthwise[::2], depthwise[1::2], out_weight, out_bias)
    return y if residual is None else y + residual


def _ffn_limits(backend: str, x: Tensor, in_weight: Tensor, in_bias: Tensor, *rest: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "multiscale_ffn has no float64 kernel"
    kernels = [tuple(weight.shape[2:]) for weight in rest[:6:2]]
    return None if kernels == [(3, 3)] * 3 else f"the depthwise kernels must be 3 x 3, got {kernels}"


_define_differentiable(
    "multiscale_ffn(Tensor x, Tensor in_weight, Tensor in_bias, Tensor dw_weight1, Tensor dw_bias1, Tensor dw_weight2, "
    "Tensor dw_bias2, Tensor dw_weight4, Tensor dw_bias4, Tensor out_weight, Tensor out_bias, Tensor? residual) "
    "-> Tensor",
    "bool need_x, bool need_params",
    "ffn",
    _multiscale_ffn,
    lambda x, *rest: _empty(x, x.shape[0], rest[9].shape[0], x.shape[2], x.shape[3]),
    _ffn_limits,
    groups=(0, *[1] * 10),
    residual=True,
    products=True,
)

# attention ------------------------------------------------------------------------------------------------------------


def _attention_limits(backend: str, x: Tensor, *args: Any) -> str | None:
    return _no_triton_fp64(backend, x) if backend == "triton" else _pointwise_limits(backend, x)


_define_differentiable(
    "channel_attention(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor",
    "bool need_x, bool need_params",
    "attention",
    reference.channel_attention,
    lambda x, *parameters: _empty(x, *x.shape),
    _attention_limits,
    groups=(0, 1, 1, 1, 1),
)
