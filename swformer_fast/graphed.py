"""`graphed`: inference as replays of CUDA graphs, one for each kind of call."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map_only

from ._layout import channels_last, empty
from .backend import PACKAGE, default_backend
from .reference.common import check_integer, check_positive

WARM_UP = 3  # calls before a capture: they compile, load and test kernels and choose algorithms, which it may not
CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format)
_LOCK = threading.RLock()  # of the graphs' buffers, and of captures: PyTorch allows a process one at a time
_log = logging.getLogger(PACKAGE)


class Pool:
    """CUDA graphs of one device that share their memory. Of their replays each waits for the one before."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device, self.handle = device, torch.cuda.graph_pool_handle()
        self.stream, self.last = torch.cuda.Stream(device), torch.cuda.Event()

    @staticmethod
    def capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any, int]:
        """The replay of `run`, the result that each replay computes anew in the same memory, and the pool's growth."""
        # The casts of parameters that autocast caches are freed while a graph would still read them.
        uncached = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False)
        with torch.cuda.device(self.device), uncached:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
            # After a failed capture the graph's context leaves the stream as it is, the stream's does not.
            with torch.cuda.stream(self.stream):
                try:
                    with torch.cuda.graph(graph, self.handle, self.stream, capture_error_mode="thread_local"):
                        result = run()
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    raise RuntimeError(
                        "the model cannot be captured in a CUDA graph: its forward reads from the device, copies from "
                        "the host or fails there; call it without `graphed`"
                    ) from error
            return graph.replay, result, torch.cuda.memory_reserved() - before

    def begin(self) -> None:
        """Let the current stream wait for the last replay."""
        torch.cuda.current_stream(self.device).wait_event(self.last)

    def end(self) -> None:
        """What the current stream has been given is what the next replay waits for."""
        self.last.record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        self.last.synchronize()


class _Graph(NamedTuple):
    pool: Pool
    image: Tensor
    replay: Callable[[], None]
    outputs: Any

    def __call__(self, x: Tensor) -> Any:
        self.pool.begin()
        with torch.inference_mode(False), torch.no_grad():
            self.image.copy_(x)
            self.replay()
        outputs = tree_map_only(Tensor, Tensor.clone, self.outputs)  # in the caller's mode
        self.pool.end()
        return outputs


class _Graphs:
    """The graphs of one module, the last used last. A copy is empty."""

    def __init__(self, kind: type[Pool], max_graphs: int, max_bytes: int | None) -> None:
        self.kind, self.max_graphs, self.max_bytes = kind, max_graphs, max_bytes
        self.by_key: OrderedDict[Any, _Graph] = OrderedDict()
        self.pool: Pool | None = None
        self.bytes = 0
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.max_graphs, self.max_bytes)

    def forget(self) -> None:
        self.keep(0)
        self.state: Any = None
        self.too_large: set[Any] = set()

    def keep(self, count: int) -> None:
        """Keep the `count` graphs used last. With the last one the pool goes: no graph may enter a pool without one."""
        if self.pool is not None and len(self.by_key) > count:
            self.pool.finish()
        while len(self.by_key) > count:
            self.by_key.popitem(last=False)
        if not self.by_key:
            self.pool, self.bytes = None, 0

    def take(self, key: Any, state: Any, x: Tensor, run: Callable[[Tensor], Any]) -> _Graph | None:
        """The graph for this call, captured where there is none; None where it would not fit into max_bytes."""
        if state != self.state:
            self.forget()
            self.state = state
        graph = self.by_key.pop(key, None)
        while graph is None and key not in self.too_large:
            self.keep(self.max_graphs - 1)
            graph = self._capture(key, x, run)
        if graph is not None:
            self.by_key[key] = graph
        return graph

    def _capture(self, key: Any, x: Tensor, run: Callable[[Tensor], Any]) -> _Graph | None:
        """None where it did not fit beside others, which then are gone, or fits not even alone."""
        self.pool = self.pool or self.kind(x.device)
        image = empty(x, *x.shape).copy_(x)
        try:
            replay, outputs, grown = self.pool.capture(lambda: run(image))
            for leaf in tree_leaves(outputs):
                if not isinstance(leaf, (Tensor, *CONSTANTS)):
                    raise TypeError(f"the model must return tensors to be captured, got {type(leaf).__name__}")
        except torch.OutOfMemoryError:
            alone = not self.by_key
            self.keep(0)
            if alone:
                raise
            return None
        except BaseException:
            self.keep(len(self.by_key))
            raise
        self.bytes += grown
        _log.info("a CUDA graph is captured for %s %s: %d bytes", x.dtype, tuple(x.shape), grown)
        if self.max_bytes is not None and self.bytes > self.max_bytes:
            if not self.by_key:
                self.too_large.add(key)
            self.keep(0)
            return None
        return _Graph(self.pool, image, replay, outputs)


class Graphed(nn.Module):
    """What `graphed` returns."""

    def __init__(
        self, module: nn.Module, max_graphs: int = 8, max_bytes: int | None = None, kind: type[Pool] = Pool
    ) -> None:
        super().__init__()
        self.module, self.training = module, module.training
        self._graphs = _Graphs(kind, max_graphs, max_bytes)

    def forward(self, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.module(*args, **options)
        with _LOCK:
            call, graphs = self._call(args, options), self._graphs
            if not isinstance(call, str):
                x, *others = args
                with torch.inference_mode(False), torch.no_grad():
                    graph = graphs.take(*call, x, lambda image: self.module(image, *others, **options))
                if graph is not None:
                    return graph(x)
        return self.module(*args, **options)

    def why_not(self, *args: Any, **options: Any) -> str:
        """What a call with these arguments would do: "a graph is replayed", "a graph is captured", or why neither.

        Nothing runs.
        """
        with _LOCK:
            call, graphs = self._call(args, options), self._graphs
            if isinstance(call, str):
                return f"the module is called: {call}"
            key, state = call
            same = state == graphs.state
            if same and key in graphs.too_large:
                return f"the module is called: its graph needs more than {graphs.max_bytes} bytes (max_bytes)"
            return "a graph is replayed" if same and key in graphs.by_key else "a graph is captured"

    def clear(self) -> None:
        """Give back all graphs and their memory."""
        with _LOCK:
            self._graphs.forget()

    def _call(self, args: tuple[Any, ...], options: dict[str, Any]) -> str | tuple[Any, Any]:
        """The key of this call and the state of the module, or why no graph is used."""
        x: Any = args[0] if args else None
        kind = self._graphs.kind
        if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided:
            return "its first argument is no plain dense tensor"
        if x.device.type != kind.device_type:
            return f"the input is on {x.device.type}"
        if not x.numel():
            return "the input is empty"
        if kind.capturing():
            return "another graph is being captured, which takes its kernels in"
        if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
            return "torch.func or a dispatch mode must see its operators"
        try:
            constants = _constant(args[1:]), _constant(tuple(options.items()))
        except TypeError as error:
            return str(error)
        state: list[Any] = [x.device]
        tensors: list[Tensor] = []
        reason = _read(self.module, state, tensors)
        if reason is not None:
            return reason
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
            return "gradients are needed: call it under torch.no_grad() or torch.inference_mode()"
        if state != self._graphs.state:
            elsewhere = {t.device for t in tensors} - {x.device}
            if elsewhere:
                return f"parameters or buffers are on {elsewhere.pop()}, the input is on {x.device}"
        device = kind.device_type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        choices = default_backend(), torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
        return (x.shape, channels_last(x), x.dtype, constants, autocast, _precision(), choices), state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *others)


def _precision() -> tuple[Any, ...]:
    """Of fp32 products and convolutions. Where both of PyTorch's ways set it, the older one cannot be read."""
    products, convolutions = torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv")  # noqa: B009
    try:
        return products.fp32_precision, convolutions.fp32_precision, torch.get_float32_matmul_precision()
    except RuntimeError:
        return products.fp32_precision, convolutions.fp32_precision


def _constant(value: Any) -> Any:
    """A key for it, its type included: 1 is not True."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_constant, value))
    if not isinstance(value, CONSTANTS):
        raise TypeError(f"an argument beside the input is a {type(value).__name__}")
    return type(value), value


def _read(module: nn.Module, state: list[Any], tensors: list[Tensor]) -> str | None:
    """Append what a graph of `module` stands on to `state`, and all of its tensors; or why it cannot have a graph.

    This runs at every call: one loop, with neither named_modules nor named_parameters.
    """
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "a hook of all modules' forwards would not be called"
    modules, values = [module], []
    for part in modules:
        if part is None:
            continue
        attributes = part.__dict__
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
            return f"a forward hook of {type(part).__name__} would not be called"
        if attributes["training"] and isinstance(part, _NormBase) and part.track_running_stats:
            return f"{type(part).__name__} is in training and changes its running statistics: call eval() first"
        state += type(part), attributes["training"], attributes.get("forward")
        values += attributes["_parameters"].values()
        values += attributes["_buffers"].values()
        modules += attributes["_modules"].values()
    tensors += [t for t in values if t is not None]
    for kind in {*map(type, tensors)} - {Tensor, nn.Parameter}:
        return f"a parameter or buffer is a {kind.__name__}, not a plain tensor"
    # An address may come back with another dtype or layout after a module has moved.
    state += map(Tensor.data_ptr, tensors)
    state += [t.dtype for t in tensors]
    state += [t.shape for t in tensors]
    state += map(Tensor.stride, tensors)
    return None


def graphed(model: nn.Module, max_graphs: int = 8, max_bytes: int | None = None) -> Graphed:
    """`model` for inference, as replays of CUDA graphs: one launch instead of hundreds, at small batches the most time.

    ::

        fast = graphed(model.eval())
        with torch.inference_mode():
            y = fast(x)              # as model(x)

    Each kind of call is captured at its first call, after warm-up calls; from then on::

        x' <- x                      # one copy into the graph's input
        replay                       # y' = model(x'), in the same memory each time
        y = a copy of y'             # never overwritten by a later call

    A kind of call is: shape, dtype and device of `x`; whether it is channels_last (an input of any other strides is
    copied into a contiguous one); the other arguments (`exit="small"`), which are numbers, strings and the like;
    autocast and its dtype; the precision of fp32 products and convolutions; deterministic settings; `use_backend`. All
    graphs are captured anew once a parameter, a buffer, a submodule, its class or its training flag is another than
    before: moved, cast, quantised, replaced, accelerated, loaded with `assign=True`. Weights that change in place (an
    optimizer's step, `load_state_dict`) are read by the graphs as they are. What no graph sees is a change of anything
    else that `forward` reads, such as `eps` of a normalisation: call `clear()` after it.

    The model itself is called, as it is, where a graph would do something else; `fast.why_not(x)` says which and why:
    input not on a GPU, empty, or no plain tensor; arguments that are tensors; gradients needed (grad mode on, and
    anything that requires one); a batch normalisation in training; forward hooks inside (hooks of the result are
    called); parameters that are tensor subclasses or on another device; torch.compile, torch.func, tracing, dispatch
    modes, or a capture around it.

    Memory: the graphs share one pool, as large as the largest of them needs at its time and a copy of every output,
    beside one copy of each input. The graph used longest ago makes way for more than `max_graphs`; its memory serves
    the next ones. Where the pool would outgrow `max_bytes`, all make way; a graph too large by itself is not kept, and
    the model is called. `clear()` gives back everything. More kinds of calls in turn than fit are captured again and
    again, which costs more than it saves: each capture is logged (logger `swformer_fast`, INFO).

    A replay runs the kernels of an eager call: the same bits, as far as they do not depend on cuDNN's choices.
    Threads: one lock around all calls. Streams: a replay runs on the current stream, where its result is valid as any
    operator's, after the wrapper's replays on other streams.

    Args:
        model: any module whose first argument is the input; it returns a tensor or a nest of tensors. Kept as
            `.module`; `state_dict` and `load_state_dict` are the model's, `train`, `eval`, `to` and the like reach it.
        max_graphs: most graphs at a time.
        max_bytes: most bytes of their pool, as measured around each capture (what other threads reserve meanwhile
            counts); None: no limit.

    Returns:
        A module. Copies, pickled ones too, have no graphs: they capture their own.

    Raises:
        TypeError, ValueError: model is no nn.Module, or holds scripted or traced ones; a limit is no int or below 1.
        RuntimeError, TypeError: in a call, where the model cannot be captured: its forward waits for the device, copies
            from the host, or returns something else than tensors. The call is not made in another way, as after a
            failed capture PyTorch's allocator is not what it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("model must not hold modules that were scripted or traced by torch.jit")
    max_graphs = check_positive("max_graphs", max_graphs)
    if max_bytes is not None:
        max_bytes = check_integer("max_bytes", max_bytes)
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1 or None, got {max_bytes}")
    return Graphed(model, max_graphs, max_bytes)
