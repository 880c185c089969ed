"""The operators as functions: they check their arguments, then call the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .arguments import check_floating, check_guidance, check_like, check_sequence, number, number_list, numbers
from .model import guided_by_tensor

_OUT_RECORDS_NOTHING = "out must be None where gradients are recorded (or use torch.no_grad()), got a tensor"
_OUT_IS_NOT_TRANSFORMED = "out must be None in forward mode and under torch.func transforms, got a tensor"


def sampler_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    *,
    a: float,
    b: float,
    terms: Sequence[Tensor] = (),
    scales: Sequence[float] = (),
    clip: float | None = None,
    c: float = 0.0,
    pred_x: float = 0.0,
    pred_eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""One update of a sampler's state, in one pass over memory. Equivalent to

        eps = cond if uncond is None else uncond + guidance * (cond - uncond)
        x_next = a * x + b * eps + sum(scale * term for scale, term in zip(scales, terms))
        if clip is not None:
            x_next += c * (pred_x * x + pred_eps * eps).clamp(-clip, clip)

    Every scheduler that is affine in its state and the model's outputs is a choice of these numbers; with
    x = alpha x_0 + sigma noise before the step and alpha', sigma' after it:

    ===============================  ===============================================================================
    DDIM, epsilon                    a = alpha'/alpha, b = sigma' - sigma alpha'/alpha
    DDIM, epsilon, clipped           a = 0, b = sigma', c = alpha', pred_x = 1/alpha, pred_eps = -sigma/alpha
    ... `use_clipped_model_output`   a = sigma'/sigma, b = 0, c = alpha' - alpha sigma'/sigma, pred_x, pred_eps so too
    DDIM, v, clipped                 a = sigma sigma', b = alpha sigma', c = alpha', pred_x = alpha, pred_eps = -sigma
    DDPM, epsilon, clipped           a and c: those of the posterior's mean, b = 0, terms = [noise], scales = [std]
    Euler, flow matching             a = 1, b = sigma' - sigma
    DPM-Solver, UniPC, DEIS, LMS     terms: earlier states and model outputs
    ===============================  ===============================================================================

    Args:
        x: the state, of any shape, strides and of dtype float32, float64, float16 or bfloat16.
        cond, uncond: the model's output with the condition and, under classifier-free guidance, without; like x.
        guidance: w; a tensor that broadcasts against x for guidance that differs between samples or is learned. It is
            combined with cond and uncond in float32 (float64 for float64), and eps then rounded to x's dtype.
        terms, scales: further tensors like x, and their factors: noise, earlier states, earlier outputs.
        clip, c, pred_x, pred_eps: the clipped sample prediction; see above.
        out: write the result here instead of into a new tensor; no gradients. May be `x` itself or any other of the
            inputs, but must not overlap one otherwise. The call allocates nothing and does not synchronise, so that
            CUDA graphs can record it.

    Returns:
        x_next, in x's dtype and (where x is dense) layout, or `out`.

    Computed in float32 (float64 for float64). Differentiable to any order in x, cond, uncond, terms and a tensor
    `guidance`; only with `clip` are tensors saved for it. Deterministic. Under autocast cond, uncond and terms are
    cast to x's dtype, and x keeps its own. Falls back to plain PyTorch for more than 8 terms or 6 dimensions, and
    where the extension was not built. Source: classifier-free guidance, arXiv 2207.12598; DDIM, arXiv 2010.02502.

    Raises:
        TypeError, ValueError: an argument is no dense tensor, or of another dtype, shape or device than x; a number is
            not finite, or clip is below 0.
        RuntimeError: `out` is given while gradients are recorded for an input.
    """
    check_floating("x", x)
    check_like("cond", cond, "x", x)
    if uncond is not None:
        check_like("uncond", uncond, "x", x)
    if isinstance(guidance, Tensor):
        if uncond is None:
            raise ValueError("uncond must be given with a tensor guidance, which guides from it, got None")
        check_guidance("guidance", guidance, "x", x)
        cond, uncond, guidance = guided_by_tensor(uncond.to(x.dtype), cond.to(x.dtype), guidance), None, 1.0
    check_sequence("terms", terms)
    for k, term in enumerate(terms):
        check_like(f"terms[{k}]", term, "x", x)
    scales = number_list("scales", scales)
    clip = None if clip is None else number("clip", clip, 0)
    guidance, a, b, c, pred_x, pred_eps = numbers(guidance=guidance, a=a, b=b, c=c, pred_x=pred_x, pred_eps=pred_eps)
    if len(terms) != len(scales):
        raise ValueError(f"scales must have one number for each of the {len(terms)} terms, got {len(scales)}")
    arguments = (x, cond, uncond, guidance, a, b, list(terms), scales, c, pred_x, pred_eps, clip)
    if out is None:
        return ops.step(*arguments)
    _check_out("out", out, "x", x, (x, cond, uncond, *terms))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, cond, uncond, *terms)):
        raise RuntimeError(_OUT_RECORDS_NOTHING)
    if ops.transformed():
        raise RuntimeError(_OUT_IS_NOT_TRANSFORMED)
    torch.ops.sdo_fast.sampler_step_out.default(*arguments, out)
    return out


def shortcut_backward(
    grad: Tensor,
    a: float,
    b: float,
    guidance: float | None = None,
    *,
    x: Tensor | None = None,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    clip: float | None = None,
    c: float = 0.0,
    pred_x: float = 0.0,
    pred_eps: float = 0.0,
    out: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    r"""The cotangents of a step, or of the whole sampler, in one pass over memory. Equivalent to

        kept = 1 if clip is None else (pred_x * x + pred_eps * eps).abs() <= clip     # eps as in sampler_step
        grad_eps = (b + c * pred_eps * kept) * grad
        grad_x = (a + c * pred_x * kept) * grad
        grad_cond, grad_uncond = guidance * grad_eps, (1 - guidance) * grad_eps       # without guidance: grad_eps, None

    With a = A_s and b = B_s of `sdo_fast.coefficients` and grad = d loss / d x_0 this is the gradient shortcut: grad_x
    is the latents' direct gradient, and (grad_uncond, grad_cond) are what the vector-Jacobian product of the model at
    step s takes. With the numbers of one `sampler_step` it is that step's backward.

    Args:
        grad: of any shape and strides, float32, float64, float16 or bfloat16.
        guidance: w, or None for a model called once.
        x, cond, uncond: what the step was given; needed with `clip` alone.
        out: (grad_x, grad_cond, grad_uncond) to write into, None for each that is not wanted. The two halves may be
            `buffer[B:]` and `buffer[:B]` of one tensor, the cotangent of a model called once on [uncond, cond].

    Returns:
        grad_x, grad_cond, grad_uncond (None without guidance), or `out`.

    Computed in float32 (float64 for float64). Differentiable in grad to any order. Deterministic; falls back as
    `sampler_step` does. Source: "You Only Look One Step", arXiv 2505.07477.

    Raises:
        TypeError, ValueError: as in `sampler_step`, or `clip` without x and cond.
        RuntimeError: `out` is given while gradients are recorded for `grad`.
    """
    check_floating("grad", grad)
    clip = None if clip is None else number("clip", clip, 0)
    a, b, c, pred_x, pred_eps = numbers(a=a, b=b, c=c, pred_x=pred_x, pred_eps=pred_eps)
    guidance = None if guidance is None else number("guidance", guidance)
    inputs = {"x": x, "cond": cond, "uncond": uncond} if clip is not None else {}
    for name, tensor in inputs.items():
        if tensor is None and (name != "uncond" or guidance is not None):
            raise ValueError(f"{name} must be given with clip, to tell what was clipped, got None")
        if tensor is not None:
            check_like(name, tensor, "grad", grad)
    if clip is not None and guidance is None and uncond is not None:
        raise ValueError("uncond must be None where guidance is, for nothing would use it, got a tensor")
    arguments = (grad, a, b, 1.0 if guidance is None else guidance, *(inputs.get(n) for n in ("x", "cond", "uncond")))
    arguments += (c, pred_x, pred_eps, clip)
    if out is None:
        grad_x, grad_cond, grad_uncond = ops.shortcut(*arguments, True, True, guidance is not None)
        return grad_x, grad_cond, grad_uncond if guidance is not None else None
    if not isinstance(out, (list, tuple)) or len(out) != 3:
        raise TypeError(f"out must be a tuple of grad_x, grad_cond and grad_uncond, got {type(out).__name__}")
    if guidance is None and out[2] is not None:
        raise ValueError("out must have None in the third place without guidance (no uncond half), got a tensor")
    for k, name in enumerate(("grad_x", "grad_cond", "grad_uncond")):
        tensor, earlier = out[k], out[:k]
        if tensor is not None:
            _check_out(f"out ({name})", tensor, "grad", grad, (grad, *inputs.values()), earlier)
    if torch.is_grad_enabled() and grad.requires_grad:
        raise RuntimeError(_OUT_RECORDS_NOTHING)
    if ops.transformed():
        raise RuntimeError(_OUT_IS_NOT_TRANSFORMED)
    ops.shortcut_kernel(grad)(*arguments, *out)
    return out


def _check_out(
    name: str,
    out: Tensor,
    other_name: str,
    other: Tensor,
    inputs: Sequence[Tensor | None],
    others: Sequence[Tensor | None] = (),
) -> None:
    check_like(name, out, other_name, other)
    if out.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {out.dtype}")
    if torch.compiler.is_compiling():
        return
    if out.is_neg():  # PyTorch's fallback for such views cannot write
        raise ValueError(f"{name} must hold its own numbers, got a negative view of others")
    if torch._debug_has_internal_overlap(out) == 1:
        raise ValueError(f"{name} must have memory of its own, got a tensor whose elements share it (expanded?)")
    begin, end = _span(out)
    for tensors, may_be_same in ((inputs, True), (others, False)):
        for tensor in tensors:
            if tensor is None or (tensor is out and may_be_same):
                continue
            first, last = _span(tensor)
            if first < end and begin < last and not (may_be_same and _same_view(out, tensor)):
                raise ValueError(
                    f"{name} must be the same view as an input, or other memory, got one that overlaps another tensor"
                )


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first element and behind the last one."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return begin, begin + tensor.nbytes
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
