"""A sampler's model calls as replays of one CUDA graph."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_, tree_map_only

from .model import GuidedModel
from .reuse import same

WARM_UP = 3  # calls before a capture: they load kernels and choose algorithms, which it may not


def capture(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """The replay of `run` as a CUDA graph, and the result that each replay computes anew in the same memory."""
    # The casts of parameters that autocast caches are freed while a graph would still read them.
    uncached = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False)
    with torch.cuda.device(device), uncached:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            result = run()
    return graph.replay, result


class CapturedModel:
    """`eps.evaluate(x, t)` without a gradient: x', t' <- x, t; graph: o' <- model(x', t', **k'); a copy of o'.

    k' <- k, the tensors of the keyword arguments, once for each `eps`, that is once a pass of the sampler. One graph is
    kept; `SamplerConfig.cuda_graph` says when it is captured anew.
    """

    def __init__(self, capture: Callable[..., Any] = capture, device: str = "cuda") -> None:
        self._capture, self._device = capture, device
        self._state: Any = None
        self._bound: Callable[[], GuidedModel | None] = lambda: None

    def check(self, latents: Tensor, eps: GuidedModel) -> None:
        for name, values in (("latents", latents), ("model_kwargs", eps.cond), ("uncond_kwargs", eps.uncond)):
            for leaf in tree_leaves(values):
                if isinstance(leaf, Tensor) and leaf.device.type != self._device:
                    raise ValueError(f"{name} must be on a CUDA GPU with cuda_graph, got {leaf.device}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, eps: GuidedModel, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if self._bound() is not eps:
            self._bind(eps, x, t)
        _, (x_buffer, t_buffer, _), replay, outputs = self._state
        x_buffer.copy_(x)
        t_buffer.copy_(t)
        replay()
        return tuple(output.clone() for output in outputs)

    def _bind(self, eps: GuidedModel, x: Tensor, t: Tensor) -> None:
        """Capture a graph unless there is one that fits, and fill k'."""
        arguments = (eps.uncond, eps.cond) if eps.joined is None else eps.joined
        buffers = torch.empty_like(x), torch.empty_like(t), tree_map_only(Tensor, torch.empty_like, arguments)
        module = eps.model if isinstance(eps.model, nn.Module) else nn.Module()
        addresses = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]
        call = eps.model, [m.training for m in module.modules()], eps.evaluations, eps.timestep_by_name
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = *call, addresses, *autocast, tree_map_only(Tensor, _like, buffers)
        if self._state is None or not same(self._state[0], key):
            self._state = None  # its memory goes before new memory is taken
            tree_map_(_fill, buffers, (x, t, arguments))
            model = copy.copy(eps)
            model.joined = None if eps.joined is None else buffers[2]
            model.uncond, model.cond = buffers[2] if eps.joined is None else ({}, {})
            self._state = key, buffers, *self._capture(lambda: model.evaluate(*buffers[:2]), x.device)
        tree_map_(_fill, self._state[1][2], arguments)
        self._bound = weakref.ref(eps)


def _fill(buffer: Any, value: Any) -> None:
    if isinstance(buffer, Tensor):
        buffer.copy_(value)


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
