"""The operators: schema, fake kernel, autograd and autocast of each. The only file that talks to torch.library.

Each operator has two forms, one that returns new tensors and one (`_out`) that writes into given ones; both run the
same kernel, through `backend.run`. `shortcut_backward` is the gradient of `sampler_step`, and its own gradient is
plain PyTorch, so derivatives of any order are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import DTYPES
from .backend import OPS, Op, kernel, run
from .reference.shortcut import shortcut_backward, unclipped
from .reference.step import sampler_step

NAMESPACE = "sdo_fast"
MAX_TERMS = 8
MAX_DIMENSIONS = 6
_LIB = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _LIB.define(schema, tags=_TAGS)
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)


def _limits(first: Tensor) -> str | None:
    if first.dim() > MAX_DIMENSIONS:
        return f"the kernels take at most {MAX_DIMENSIONS} dimensions, got {first.dim()}"
    return None if first.dtype in DTYPES else f"the kernels take no {first.dtype}"


def _direct(op: Op, overload: Callable[..., None], first: Tensor) -> Callable[..., None]:
    """The op's overload, or where nobody listens to the dispatcher the kernel behind it."""
    plain = type(first) in (Tensor, torch.nn.Parameter)
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not plain or watched or torch._C._functorch.peek_interpreter_stack() is not None:
        return overload
    return kernel(op, (first,))


# step -----------------------------------------------------------------------------------------------------------------

_STEP = (
    "Tensor x, Tensor cond, Tensor? uncond, float guidance, float a, float b, Tensor[] terms, float[] scales, float c, "
    "float pred_x, float pred_eps, float? clip"
)


def _reference_step(*args: Any) -> None:
    args[-1].copy_(sampler_step(*args[:-1]))


def _step_limits(x: Tensor, *args: Any) -> str | None:
    terms = len(args[5]) if len(args) > 5 else 0
    return f"the kernels take at most {MAX_TERMS} terms, got {terms}" if terms > MAX_TERMS else _limits(x)


STEP = OPS["sampler_step"] = Op("sampler_step", _reference_step, _step_limits)


def _step(x: Tensor, *args: Any) -> Tensor:
    out = torch.empty_like(x)
    run(STEP, (x, *args, out))
    return out


_define(f"sampler_step({_STEP}) -> Tensor", _step, lambda x, *args: torch.empty_like(x))
_define(f"sampler_step_out({_STEP}, Tensor(a!) out) -> ()", lambda *args: run(STEP, args), lambda *args: None)


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cond, uncond, guidance, a, b, _, scales, c, pred_x, pred_eps, clip = inputs
    ctx.save_for_backward(*((x, cond, uncond) if clip is not None else (None, None, None)))
    ctx.factors = (a, b, guidance if uncond is not None else 1.0)
    ctx.clipping = (c, pred_x, pred_eps, clip)
    ctx.scales = scales


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    halves: tuple[Any, ...] = (None, None, None)
    if any(needs[:3]):
        grads = torch.ops.sdo_fast.shortcut_backward(
            grad, *ctx.factors, *ctx.saved_tensors, *ctx.clipping, needs[0], needs[1], bool(needs[2])
        )
        halves = tuple(g if need else None for g, need in zip(grads, needs, strict=False))
    terms = [scale * grad if need else None for scale, need in zip(ctx.scales, needs[6], strict=True)]
    # torch takes an empty list of numbers for one of tensors.
    return (*halves, None, None, None, terms, None if terms else [], None, None, None, None)


torch.library.register_autograd(f"{NAMESPACE}::sampler_step", _step_backward, setup_context=_save_step, lib=_LIB)


def transformed() -> bool:
    """Whether torch.func transforms the call, or it runs in forward mode: PyTorch's own ops alone have rules for it."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def step(x: Tensor, cond: Tensor, uncond: Tensor | None, *args: Any) -> Tensor:
    """`sampler_step`, past the machinery of autograd where no gradient is recorded."""
    if transformed():
        return sampler_step(x, cond, uncond, *args)
    inputs = (x, cond, *args[3]) if uncond is None else (x, cond, uncond, *args[3])
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return torch.ops.sdo_fast.sampler_step.default(x, cond, uncond, *args)
    out = torch.empty_like(x)
    torch.ops.sdo_fast.sampler_step_out.default(x, cond, uncond, *args, out)
    return out


def step_kernel(x: Tensor) -> Callable[..., None]:
    """`sampler_step_out` for states like x, without autograd or autocast."""
    return _direct(STEP, torch.ops.sdo_fast.sampler_step_out.default, x)


def _keep_the_state_under_autocast(name: str) -> None:
    """Under autocast every tensor is cast to the dtype of x: a sampler's state keeps its precision."""
    op = getattr(torch.ops.sdo_fast, name)
    for device in ("CPU", "CUDA"):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def cast_and_call(
            x: Tensor,
            cond: Tensor,
            uncond: Tensor | None,
            guidance: float,
            a: float,
            b: float,
            terms: Sequence[Tensor],
            *args: Any,
            keys: Any = keys,
        ) -> Any:
            terms = [term.to(x.dtype) for term in terms]
            uncond = None if uncond is None else uncond.to(x.dtype)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(x, cond.to(x.dtype), uncond, guidance, a, b, terms, *args)

        _LIB.impl(name, cast_and_call, f"Autocast{device}")


_keep_the_state_under_autocast("sampler_step")
_keep_the_state_under_autocast("sampler_step_out")


# shortcut -------------------------------------------------------------------------------------------------------------

_SHORTCUT = (
    "Tensor grad, float a, float b, float guidance, Tensor? x, Tensor? cond, Tensor? uncond, float c, float pred_x, "
    "float pred_eps, float? clip"
)


def _reference_shortcut(*args: Any) -> None:
    for out, result in zip(args[11:], shortcut_backward(*args[:11]), strict=True):
        if out is not None:
            out.copy_(result)


SHORTCUT = OPS["shortcut_backward"] = Op("shortcut_backward", _reference_shortcut, lambda grad, *args: _limits(grad))


def _shortcut(*args: Any) -> tuple[Tensor, ...]:
    grad = args[0]
    outs = [torch.empty_like(grad) if need else None for need in args[11:]]
    run(SHORTCUT, (*args[:11], *outs))
    return tuple(grad.new_empty(0) if out is None else out for out in outs)


_define(
    f"shortcut_backward({_SHORTCUT}, bool need_x, bool need_cond, bool need_uncond) -> (Tensor, Tensor, Tensor)",
    _shortcut,
    lambda *args: tuple(torch.empty_like(args[0]) if need else args[0].new_empty(0) for need in args[11:]),
)
_define(
    f"shortcut_backward_out({_SHORTCUT}, Tensor(a!)? grad_x, Tensor(b!)? grad_cond, Tensor(c!)? grad_uncond) -> ()",
    lambda *args: run(SHORTCUT, args),
    lambda *args: None,
)


def shortcut(*args: Any) -> tuple[Tensor, ...]:
    """`shortcut_backward`, whose last three arguments say which gradients are needed."""
    if transformed():
        grads = shortcut_backward(*args[:11])
        return tuple(g if need else args[0].new_empty(0) for g, need in zip(grads, args[11:], strict=True))
    return torch.ops.sdo_fast.shortcut_backward.default(*args)


def shortcut_kernel(grad: Tensor) -> Callable[..., None]:
    """`shortcut_backward_out` for cotangents like grad, without autograd."""
    return _direct(SHORTCUT, torch.ops.sdo_fast.shortcut_backward_out.default, grad)


def _save_shortcut(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *factors, x, cond, uncond, c, pred_x, pred_eps, clip, need_x, need_cond, need_uncond = inputs
    ctx.save_for_backward(*((x, cond, uncond) if clip is not None else (None, None, None)))
    ctx.factors, ctx.clipping, ctx.needs = factors, (c, pred_x, pred_eps, clip), (need_x, need_cond, need_uncond)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    (a, b, guidance), (c, pred_x, pred_eps, clip) = ctx.factors, ctx.clipping
    dtype = torch.promote_types(cotangents[0].dtype, torch.float32)
    zero: Any = 0.0
    by_x, by_cond, by_uncond = (h.to(dtype) if need else zero for h, need in zip(cotangents, ctx.needs, strict=True))
    by_eps = guidance * by_cond + (1 - guidance) * by_uncond
    result = a * by_x + b * by_eps
    if clip is not None:
        x, cond, uncond = ctx.saved_tensors
        kept = unclipped(x, cond, uncond, guidance, pred_x, pred_eps, clip)
        result = result + torch.where(kept, c * pred_x * by_x + c * pred_eps * by_eps, 0)
    return (result.to(cotangents[0].dtype), *(None,) * 13)


torch.library.register_autograd(
    f"{NAMESPACE}::shortcut_backward", _double_backward, setup_context=_save_shortcut, lib=_LIB
)
