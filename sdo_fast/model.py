"""The model call of a sampler: guidance, output formats, variance channels. Knows no kernel."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .arguments import check_mapping


class GuidedModel:
    """eps(x, t) = model(x, t, **model_kwargs), or with guidance_scale w (classifier-free guidance, arXiv 2207.12598)

        eps(x, t) = uncond + w * (cond - uncond),
        cond = model(x, t, **model_kwargs), uncond = model(x, t, **uncond_kwargs).

    Both halves go through one call on the batch [uncond, cond] where the arguments can be joined: same names, and each
    a pair of tensors with the batch in front, a shared tensor without it, an equal plain value, or a list, tuple or
    mapping of these. Else the model is called twice, uncond first.

    The model gets x (B, C, ...) and t of shape (B,), by the name `timestep` where its second parameter is another one
    (diffusers transformers), and returns a tensor, a tuple that begins with one, or an object
    with `.sample`. Where the output has 2C channels the variance half is dropped, unless `learned_variance`: then it
    is kept, and guidance leaves it as the conditional call gave it. The output is copied, for the model may write the
    next one to the same memory, and cast to x's dtype, so that autocast does not lower the precision of the sampler's
    state. w may be a tensor that broadcasts against x, and get gradients;
    it is combined in float32 (float64 for float64) and the result rounded once.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        batch: int,
        guidance_scale: float | Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        learned_variance: bool = False,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a callable model(x, t, **kwargs), got {type(model).__name__}")
        if guidance_scale is not None and uncond_kwargs is None:
            raise ValueError(
                "uncond_kwargs must be the arguments of the unconditional call (an empty dict for none) with guidance, "
                "got None"
            )
        if guidance_scale is None and uncond_kwargs is not None:
            raise ValueError(
                "uncond_kwargs must be None without guidance_scale, where nothing would use them, "
                f"got {type(uncond_kwargs).__name__}"
            )
        check_mapping("model_kwargs", model_kwargs)
        check_mapping("uncond_kwargs", uncond_kwargs)
        self.model = model
        self.batch = batch
        self.timestep_by_name = _takes_timestep_by_name(model)
        self.guidance_scale = guidance_scale
        self.learned_variance = learned_variance
        self.cond = dict(model_kwargs or {})
        self.uncond = dict(uncond_kwargs or {})
        self.evaluations = 1 if guidance_scale is None else 2
        self.learns_guidance = isinstance(guidance_scale, Tensor)
        self.weight = None if isinstance(guidance_scale, Tensor) or learned_variance else guidance_scale
        self._combines = guidance_scale is not None and self.weight is None
        self._guided: Callable[..., Tensor] = guided_by_tensor if self.learns_guidance else guided
        self.joined: dict[str, Any] | None = None
        if guidance_scale is not None:
            try:
                self.joined = _join(self.uncond, self.cond, batch)
            except _CannotJoin:
                self.joined = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.combine(*self.evaluate(x, t))

    def evaluate(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs before guidance: (output,), or (uncond, cond)."""
        if self.guidance_scale is None:
            return (self._call(x, t, self.cond),)
        if self.joined is None:
            return self._call(x, t, self.uncond), self._call(x, t, self.cond)
        return self._call(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, self.joined).chunk(2)

    def combine(self, *outputs: Tensor) -> Tensor:
        if self.guidance_scale is None:
            return outputs[0]
        uncond, cond = outputs
        if not self.learned_variance:
            return self._guided(uncond, cond, self.guidance_scale)
        (uncond, _), (cond, variance) = uncond.chunk(2, dim=1), cond.chunk(2, dim=1)
        return torch.cat([self._guided(uncond, cond, self.guidance_scale), variance], dim=1)

    def operands(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What a step takes beside `weight`: the outputs, or the combined one where no number guides them."""
        return (self.combine(*outputs),) if self._combines else outputs

    def repeated(self, times: int) -> GuidedModel:
        """The same model for a batch of so many copies of the latents, one after the other."""
        other = copy.copy(self)
        other.batch = times * self.batch
        for name in ("cond", "uncond", "guidance_scale"):
            setattr(other, name, _repeat(getattr(self, name), times, self.batch))
        if self.joined is not None:
            other.joined = _join(other.uncond, other.cond, other.batch)
        return other

    def _call(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        t = t.expand(x.shape[0])
        output = self.model(x, timestep=t, **kwargs) if self.timestep_by_name else self.model(x, t, **kwargs)
        if not isinstance(output, Tensor):
            output = output.sample if hasattr(output, "sample") else output[0]
        channels = x.shape[1]
        expected = (x.shape[0], 2 * channels if self.learned_variance else channels, *x.shape[2:])
        if output.shape == (x.shape[0], 2 * channels, *x.shape[2:]) and not self.learned_variance:
            output = output[:, :channels]
        if output.shape != expected:
            raise ValueError(
                f"model must return shape {expected} for an input of {tuple(x.shape)}, got {tuple(output.shape)}"
            )
        # A copy: models that return the same memory at every call (CUDA graphs, TensorRT) would change what is kept.
        return output.to(x.dtype, copy=True)


def guided(uncond: Tensor, cond: Tensor, weight: float) -> Tensor:
    """uncond + weight (cond - uncond), in their dtype."""
    return uncond + weight * (cond - uncond)


def guided_by_tensor(uncond: Tensor, cond: Tensor, weight: Tensor) -> Tensor:
    """uncond + weight (cond - uncond), in float32 (float64 for float64), rounded once to their dtype."""
    dtype = torch.promote_types(cond.dtype, torch.float32)
    base = uncond.to(dtype)
    return (base + weight.to(cond.device, dtype) * (cond.to(dtype) - base)).to(cond.dtype)


def unwrapped(model: Any) -> Any:
    """What is behind torch.compile, DistributedDataParallel and peft."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if not callable(inner):
            return model
        model = inner


def _takes_timestep_by_name(model: Callable[..., Any]) -> bool:
    model = unwrapped(model)
    try:
        parameters = list(inspect.signature(getattr(model, "forward", model)).parameters)
    except ValueError:  # built-in functions have no signature
        return False
    return "timestep" in parameters and parameters[1:2] != ["timestep"]


def _repeat(value: Any, times: int, batch: int) -> Any:
    """Tensors with the batch in front are repeated, other values shared."""
    return tree_map_only(Tensor, lambda t: torch.cat([t] * times) if t.ndim > 0 and t.shape[0] == batch else t, value)


class _CannotJoin(Exception):
    pass


def _join(uncond: Any, cond: Any, batch: int) -> Any:
    """The argument of one call on [uncond, cond], or _CannotJoin."""
    if isinstance(uncond, Tensor) and isinstance(cond, Tensor):
        alike = (uncond.shape, uncond.dtype, uncond.device) == (cond.shape, cond.dtype, cond.device)
        if alike and uncond.ndim > 0 and uncond.shape[0] == batch:
            return torch.cat([uncond, cond])
        if uncond is cond:
            return uncond
    elif isinstance(uncond, Mapping) and isinstance(cond, Mapping):
        if uncond.keys() == cond.keys():
            return {name: _join(uncond[name], cond[name], batch) for name in uncond}
    elif isinstance(uncond, (list, tuple)) and type(uncond) is type(cond):
        if len(uncond) == len(cond):
            return type(uncond)([_join(u, c, batch) for u, c in zip(uncond, cond, strict=True)])
    elif uncond is cond or (
        isinstance(uncond, (bool, int, float, str)) and type(uncond) is type(cond) and uncond == cond
    ):
        return uncond
    raise _CannotJoin
