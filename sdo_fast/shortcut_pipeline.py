"""Any diffusers pipeline, run by its own code, with the gradient of chosen steps."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import update_wrapper, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _contextlib
from torch.utils._pytree import tree_leaves, tree_map_only

from .arguments import check_flag, check_sequence
from .gradients import Slopes, scaled
from .model import unwrapped
from .paths import AnyPath, Path, Schedule, as_path, draw, identity, sdo
from .pipelines import with_weights
from .repetition import repeated
from .sampler import out_of_inference_mode
from .schedulers import affine_sensitivities, posterior_mean
from .solver import Solver

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder", "model")
BESIDE = ("controlnet",)
"""Run with a denoiser at each step, and are no denoiser."""
_ABSENT = object()
_claimed: set[int] = set()
_claims = threading.Lock()


class ShortcutPipeline:
    r"""A diffusers pipeline whose result carries the graph of its denoiser at the steps of a path.

    `ShortcutPipeline(pipe)(...)` takes what `pipe(...)` takes and returns what it returns, bit for bit, for it runs the
    pipeline's own `__call__` without its `torch.no_grad`. At the steps of the path the denoiser's output keeps its
    graph; at every other step it is a constant, while everything else (scaling, packing, guidance, the scheduler,
    decoding, post-processing) stays differentiable:

        x_{i+1} = S_i(x_i, denoiser(x_i, t_i))             i in path
        x_{i+1} = S_i(x_i, denoiser(x_i, t_i).detach())    i not in path

    Gradients reach what requires them: latents, prompt embeddings, images as tensors, parameters of the denoiser and of
    its LoRA. Memory is that of the pipeline, the decoder's graph and, with `checkpoint`, one call of the denoiser. Step
    i is the i-th call of `scheduler.step`, from 0 on: guidance by two calls of the denoiser a step is one step, and a
    scheduler with two stages a step (Heun, DPM2) has two. Text and image encoders keep no graph unless an input
    requires a gradient; a safety checker's and a watermark's changes are constants. Under `torch.no_grad()` the call is
    the pipeline's.

    `output_type` is "pt" unless given; "latent" has gradients too, "pil" and "np" none: they need `torch.no_grad()`.
    Pipelines that return an array whatever is asked (LDM) give a tensor of its shape in its place.

    Args:
        pipe: the pipeline; its modules are its own, changed only while a call runs.
        path: of `sdo_fast.paths`: a recipe, a `Path`, "first", "last", "random" (a new step at each call), "identity"
            (none), "full" (all) or another recipe's name, an index or a collection of indices. An input's share is of
            the state alone, not of prompts. A path that stops early gives what the pipeline makes of the posterior mean
            there; `draft_lv`, which calls the denoiser at states of its own, needs a ShortcutSampler.
        checkpoint: call the denoiser again in backward instead of keeping its activations. Where accelerate or
            diffusers move a module's weights (offloading, layerwise casting) it is always so.
        checkpoint_decoder: the same for the autoencoder's `decode`.
        denoisers: names of the components that run at each step; None takes what the pipeline has of `unet`,
            `transformer`, `transformer_2`, `unconditional_transformer`, `prior`, `decoder`, `model`, `controlnet`.
        generator: draws the path of recipes. The `generator` of the call is the pipeline's alone, as is torch's own.

    Attributes:
        model_calls: calls of denoisers so far (ControlNets not counted); repetitions in backward count too.
        graph_calls: those of them with a graph.
        drawn: the `Path` of the last call.

    Raises:
        TypeError: `pipe` has no scheduler with a `step`, or none of these components.
        ValueError: in the call: a step outside the schedule, an `output_type` without gradients, or an argument that
            requires a gradient and cannot get one, for the pipeline cuts its graph or the path leaves it out; a path
            that stops early with a scheduler that does not tell what the model predicts.
        NotAffineError: in the call: a path with weights with a scheduler that clips or thresholds.
        RuntimeError: the pipeline or one of its denoisers already runs in such a call; fewer or more steps ran than the
            pipeline announced and the path asks for; a denoiser gave something else when its call was repeated.

    A step whose output has no weight in the result (the first stage of DPM2, the last step of PNDM) warns in backward.

    Deterministic where the pipeline is. Source of the method: arXiv 2505.07477.
    """

    def __init__(
        self,
        pipe: Any,
        path: AnyPath = "first",
        checkpoint: bool = True,
        *,
        checkpoint_decoder: bool = False,
        denoisers: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_flag("checkpoint", checkpoint)
        check_flag("checkpoint_decoder", checkpoint_decoder)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.path, self._recipe = path, as_path(path)
        if not callable(getattr(getattr(pipe, "scheduler", None), "step", None)):
            raise TypeError(f"pipe must be a pipeline with a scheduler that has a step, got {type(pipe).__name__}")
        if denoisers is not None:
            check_sequence("denoisers", denoisers)
        names = (*DENOISERS, *BESIDE) if denoisers is None else tuple(denoisers)
        self.denoisers = tuple(name for name in names if isinstance(getattr(pipe, name, None), nn.Module))
        if not set(self.denoisers) - set(BESIDE) or (denoisers is not None and len(self.denoisers) < len(names)):
            raise TypeError(
                f"pipe must have modules named {', '.join(names)}, got {type(pipe).__name__}; denoisers=(...) names "
                "the components that run at each step"
            )
        self.pipe = pipe
        self.checkpoint = checkpoint
        self.checkpoint_decoder = checkpoint_decoder
        self.generator = torch.Generator().manual_seed(torch.initial_seed()) if generator is None else generator
        self.model_calls = self.graph_calls = 0
        self.drawn = Path()
        self._measured: tuple[Any, list[float]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `pipe(*args, **kwargs)` returns, with the graph of the path."""
        call = _undecorated(type(self.pipe).__call__)
        signature = inspect.signature(call)
        asked = signature.bind_partial(self.pipe, *args, **kwargs).arguments.get("output_type")
        if asked is None and "output_type" in signature.parameters:
            kwargs["output_type"] = "pt"
        if not torch.is_grad_enabled():
            with self._claimed(), ExitStack() as swaps:
                self._swap_denoisers(swaps, _Run(self, {}))
                return self.pipe(*args, **kwargs)
        if asked in ("pil", "np"):
            raise ValueError(
                f'output_type must be "pt" or "latent", for {asked!r} has no gradient; torch.no_grad() gives it without'
            )
        args, kwargs = _lent((args, kwargs))
        given = signature.bind_partial(self.pipe, *args, **kwargs).arguments
        run = _Run(self, given)
        with self._claimed(), ExitStack() as swaps:
            self._swap_denoisers(swaps, run)
            self._swap_others(swaps, call)
            swaps.enter_context(_swapped(self.pipe.scheduler, "step", _CountedStep(run, self.pipe.scheduler.step)))
            swaps.enter_context(_swapped(self.pipe, "_num_timesteps", None))
            swaps.callback(_release_graphs, self.pipe.scheduler)
            # Whether a call makes arrays is known from its code alone; a mode slows every operator down.
            swaps.enter_context(_TensorsForArrays() if "numpy" in call.__code__.co_names else nullcontext())
            result = call(self.pipe, *args, **kwargs)
            run.check_steps()
        _check_reached(type(self.pipe).__name__, result, given, run.outputs)
        return result

    def why_not(self) -> str:
        """What keeps its graph in a call and, in words, what does not and why."""
        pipe, words = self.pipe, []
        if not self.checkpoint and any(_moves_weights(getattr(pipe, name)) for name in self.denoisers):
            words.append("their weights are moved between calls, so calls with a graph are repeated in backward")
        modules = [name for name, module in _modules(pipe).items() if name not in self.denoisers]
        constant = [name for name in modules if not hasattr(getattr(pipe, name), "decode")]
        if constant:
            words.append(f"{', '.join(constant)}: no graph unless an input requires a gradient")
        if "numpy" in _undecorated(type(pipe).__call__).__code__.co_names:
            words.append(f"where {type(pipe).__name__} returns an array, this returns a tensor of its shape")
        if getattr(pipe, "watermark", None) is not None or getattr(pipe, "safety_checker", None) is not None:
            words.append("what a watermark or a safety checker changes is a constant")
        return "; ".join([f"{', '.join(self.denoisers)}: the graph of path {self.path!r}", *words])

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The pipeline's scheduler and denoisers are this call's alone."""
        parts = {id(self.pipe.scheduler), *(id(getattr(self.pipe, name)) for name in self.denoisers)}
        with _claims:
            if parts & _claimed:
                raise RuntimeError(
                    f"pipe must not be in use: a ShortcutPipeline is already calling this {type(self.pipe).__name__} "
                    "or one that shares its scheduler or denoiser"
                )
            _claimed.update(parts)
        try:
            yield
        finally:
            with _claims:
                _claimed.difference_update(parts)

    def _swap_denoisers(self, swaps: ExitStack, run: _Run) -> None:
        for name in self.denoisers:
            module = getattr(self.pipe, name)
            # module.compile() is called in forward's place.
            attribute = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            call = self._denoiser(run, name, getattr(module, attribute), _moves_weights(module))
            swaps.enter_context(_swapped(module, attribute, call))

    def _swap_others(self, swaps: ExitStack, call: Callable[..., Any]) -> None:
        pipe = self.pipe
        for name, module in _modules(pipe).items():
            if name in self.denoisers:
                continue
            moved = _moves_weights(module)
            for method in ("forward", "encode", "decode"):
                if callable(getattr(module, method, None)):
                    repeat = moved or (self.checkpoint_decoder and method == "decode")
                    lean = _without_needless_graph(module, method, repeat)
                    swaps.enter_context(_swapped(module, method, lean))
        for name in call.__code__.co_names:
            method = inspect.getattr_static(type(pipe), name, None)
            if inspect.isfunction(method) and _undecorated(method) is not method:
                swaps.enter_context(_swapped(pipe, name, MethodType(_undecorated(method), pipe)))
        if getattr(pipe, "safety_checker", None) is not None and hasattr(pipe, "run_safety_checker"):
            swaps.enter_context(_swapped(pipe, "run_safety_checker", _as_constants(pipe.run_safety_checker)))
        if getattr(pipe, "watermark", None) is not None:
            marked = _straight_through(pipe.watermark.apply_watermark)
            swaps.enter_context(_swapped(pipe.watermark, "apply_watermark", marked))

    def _denoiser(self, run: _Run, name: str, forward: Callable[..., Any], moved: bool) -> Callable[..., Any]:
        counted = name not in BESIDE
        state = next(iter(inspect.signature(unwrapped(getattr(self.pipe, name)).forward).parameters))

        def count(*args: Any, **kwargs: Any) -> Any:
            self.model_calls += counted
            self.graph_calls += counted and torch.is_grad_enabled()
            return forward(*args, **kwargs)

        @wraps(forward)
        def denoise(*args: Any, **kwargs: Any) -> Any:
            run.check_thread()
            if not torch.is_grad_enabled():
                return count(*args, **kwargs)
            if run.stopped:
                return run.constants[name if name in run.constants else next(iter(run.constants))]
            path = run.path()
            if run.step not in path.shares:
                with torch.no_grad():
                    return run.constant(name, count(*args, **kwargs))
            share = path.shares[run.step]
            if share != 1:
                args, kwargs = _with_share(share, state, args, kwargs)
            # torch 2.10 would take the weights as autocast cast them for the calls without gradients.
            torch.clear_autocast_cache()
            if self.checkpoint or moved:
                # Pipelines change such dictionaries from call to call.
                args, kwargs = tree_map_only(Tensor, lambda t: t, (args, kwargs))
                outputs = repeated(count, *args, **kwargs)
            else:
                outputs = count(*args, **kwargs)
            run.constant(name, outputs)
            run.keep(_requiring_gradients(outputs))
            weight = path.weight(run.step) if counted else 1.0
            return outputs if weight == 1 else tree_map_only(Tensor, lambda t: scaled(t, weight), outputs)

        return denoise


class _Run:
    """One call: the step it is at, its path, and what the denoisers gave there."""

    def __init__(self, owner: ShortcutPipeline, given: Mapping[str, Any]) -> None:
        self.owner = owner
        self.given = given
        self.thread = threading.get_ident()
        self.step = 0
        self.stopped = False
        self.count = 0
        self.outputs: list[Tensor] = []
        self.mean = 0.0, 0.0
        self.constants: dict[str, Any] = {}
        """The last outputs of each denoiser, for the steps after a stop: they are not looked at."""

    def path(self) -> Path:
        if not self.count:
            pipe, path = self.owner.pipe, self.owner._recipe
            self.count = getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)
            drawn = draw(path, Schedule(range(self.count), self._coefficients), self.owner.generator)
            if drawn.noises:
                raise ValueError(f"path must have no noises in a pipeline, for which ShortcutSampler is, got {path!r}")
            if drawn.stop is not None:
                solver = self._solver()
                self.mean = posterior_mean(solver, solver.start + drawn.stop)
            self.owner.drawn = drawn
        return self.owner.drawn

    def _coefficients(self) -> list[float]:
        """B_i of the steps that run, found once a schedule."""
        solver = self._solver()
        settings = str(getattr(solver.scheduler, "config", None))
        key = (solver.name, settings, solver.timesteps.tolist(), solver.start, solver.step_kwargs)
        if self.owner._measured is None or self.owner._measured[0] != key:
            self.owner._measured = key, affine_sensitivities(solver)[1].tolist()[solver.start :]
        return self.owner._measured[1]

    def _solver(self) -> Solver:
        """The pipeline's scheduler with its schedule, from the first step that runs."""
        scheduler, step = self.owner.pipe.scheduler, type(self.owner.pipe.scheduler).step
        eta = self.given.get("eta")
        takes_eta = eta is not None and "eta" in inspect.signature(step).parameters
        return Solver.as_set(scheduler, len(scheduler.timesteps) - self.count, {"eta": eta} if takes_eta else None)

    def posterior_mean(self, output: Tensor, x: Tensor) -> Tensor:
        p, q = self.mean
        return p * x + q * output[:, : x.shape[1]]

    def constant(self, name: str, outputs: Any) -> Any:
        """The outputs without a graph."""
        outputs = tree_map_only(Tensor, Tensor.detach, outputs)
        if self.owner.drawn.stop is not None:
            self.constants[name] = outputs
        return outputs

    def keep(self, outputs: list[Tensor]) -> None:
        self.outputs.extend(outputs)
        if len(self.owner.drawn.shares) == 1:
            for output in outputs:
                output.register_hook(_warn_of_zero)

    def check_thread(self) -> None:
        if threading.get_ident() != self.thread:
            raise RuntimeError(
                f"pipe must not be in use: a ShortcutPipeline is calling this {type(self.owner.pipe).__name__} in "
                "another thread"
            )

    def check_steps(self) -> None:
        """Raise where the path is not what it was meant to be."""
        path, pipe = self.owner._recipe, type(self.owner.pipe).__name__
        fixed = isinstance(path, Path) or path in (identity(), sdo("first"))
        miscounted = not fixed and self.step != self.count
        if miscounted or not self.count or any(i >= self.step for i in self.owner.drawn.shares):
            raise RuntimeError(
                f"path {self.owner.path!r} was planned for {self.count} steps, and {pipe} ran {self.step} "
                "(interrupted, or a loop of its own kind: take an index that runs)"
            )


class _CountedStep:
    """`scheduler.step`, counted; a copy of the scheduler steps uncounted."""

    def __init__(self, run: _Run, step: Callable[..., Any]) -> None:
        self.run, self.call = run, step
        self.template: Any = None  # what a step returns, for those after a stop
        update_wrapper(self, step)  # pipelines read its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self.run.owner.pipe).__name__} must run its scheduler with gradients, got a step under "
                "torch.no_grad(): a loop inside of it that has none, or a second use of the pipeline within its call"
            )
        result = self._result(*args, **kwargs)
        self.run.step += 1
        return result

    def _result(self, *args: Any, **kwargs: Any) -> Any:
        run, stop = self.run, self.run.owner.drawn.stop
        if stop is None or run.step < stop:
            return self.call(*args, **kwargs)
        given = inspect.signature(self.call).bind(*args, **kwargs).arguments
        x = given["sample"]
        if run.step == stop:
            x = run.posterior_mean(given["model_output"], x).to(x.dtype)
            self.template = self.call(*args, **kwargs)
            run.stopped = True
        if isinstance(self.template, tuple):
            return x, *self.template[1:]
        return type(self.template)(**{**self.template, "prev_sample": x})

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        scheduler = self.run.owner.pipe.scheduler
        return MethodType(type(scheduler).step, memo.get(id(scheduler), scheduler))


class _TensorsForArrays(TorchFunctionMode):
    """The array of a tensor with a graph is the tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.numpy and args[0].requires_grad:
            return args[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` meanwhile; what others have put in its place by then stays (offloading hooks)."""
    attributes = vars(owner)
    before = attributes.get(name, _ABSENT)
    attributes[name] = value
    try:
        yield
    finally:
        if attributes.get(name, _ABSENT) is value:
            del attributes[name]
            if before is not _ABSENT:
                attributes[name] = before


def _undecorated(function: Any) -> Any:
    """The function without torch.no_grad and torch.inference_mode around it."""
    while function.__code__.co_filename == _contextlib.__file__:
        function = function.__wrapped__
    return function


def _modules(pipe: Any) -> dict[str, nn.Module]:
    parts = pipe.components if hasattr(pipe, "components") else vars(pipe)
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _moves_weights(module: nn.Module) -> bool:
    """Whether weights that a graph would keep are elsewhere, or of another dtype, by the time of its backward."""
    for part in module.modules():
        hooks = getattr(part, "_diffusers_hook", None)
        if hasattr(part, "_hf_hook") or (
            hooks is not None and any(hooks.get_hook(name) for name in ("group_offloading", "layerwise_casting"))
        ):
            return True
    return False


def _warn_of_zero(grad: Tensor) -> None:
    if not grad.any():
        warnings.warn(
            "the gradient of the path's step is exactly zero: its output has no weight in the result (sample "
            "prediction before the last step, the last step of PNDM, the first stage of KDPM2), or the loss has none",
            stacklevel=2,
        )


def _requiring_gradients(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def _with_share(share: float, state: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with so much of the gradient of the first, the denoiser's state."""
    lessened = lambda value: tree_map_only(Tensor, lambda t: scaled(t, share), value)  # noqa: E731
    return ((lessened(args[0]), *args[1:]), kwargs) if args else (args, {**kwargs, state: lessened(kwargs[state])})


def _without_needless_graph(module: nn.Module, method: str, repeat: bool) -> Callable[..., Any]:
    """Keeps a graph where an input requires a gradient, and not for the sake of parameters alone."""
    call, dtype = getattr(module, method), _dtype(module)

    @wraps(call)
    def lean(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not _requiring_gradients((args, kwargs)):
            with torch.no_grad():
                return call(*args, **kwargs)
        # Pipelines cast an autoencoder to float32 for this call and back: the graph keeps the weights of now.
        run = call if _dtype(module) == dtype else with_weights(module, call, Tensor.detach)
        return repeated(run, *args, **kwargs) if repeat else run(*args, **kwargs)

    return lean


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters()), None)


def _as_constants(check: Callable[..., Any]) -> Callable[..., Any]:
    """A check of images that may replace some: what it replaces is constant."""

    @wraps(check)
    def checked(image: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            seen, *flags = check(image.detach().clone(), *args, **kwargs)
        return torch.where(seen == image, image, seen), *flags

    return checked


def _straight_through(mark: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The marked images, with the gradient of the images."""

    @wraps(mark)
    def marked(images: Tensor) -> Tensor:
        with torch.no_grad():
            value = mark(images.detach().clone())
        return Slopes.apply(value, images, 1.0, 0.0, None)

    return marked


def _lent(values: Any) -> Any:
    """The same values; of leaves a copy, for pipelines may change what they are given in place."""
    lend = lambda t: t.clone() if t.requires_grad and t.is_leaf else t  # noqa: E731
    return tree_map_only(Tensor, lend, out_of_inference_mode(values))


def _release_graphs(scheduler: Any) -> None:
    """Schedulers keep model outputs of earlier steps: their graph would live until the next call."""
    for name, value in vars(scheduler).items():
        if _requiring_gradients(value):
            vars(scheduler)[name] = tree_map_only(Tensor, Tensor.detach, value)


def _check_reached(pipe: str, result: Any, given: dict[str, Any], outputs: list[Tensor]) -> None:
    """Raise unless the result depends on the path and on every argument that requires a gradient."""
    nodes = {name: [get_gradient_edge(t).node for t in _requiring_gradients(value)] for name, value in given.items()}
    steps = [get_gradient_edge(t).node for t in outputs]
    found = _reachable(_requiring_gradients(result), {*steps, *(node for some in nodes.values() for node in some)})
    if steps and not found & {*steps}:
        raise ValueError(
            f"path must reach the result, and in {pipe} it does not: the pipeline cuts the graph, or its scheduler "
            "leaves this step's output aside"
        )
    for name, some in nodes.items():
        if not found.issuperset(some):
            raise ValueError(
                f"{name} must not require a gradient: in {pipe} the result does not depend on it through this path, or "
                "the pipeline cuts its graph; detach it"
            )


def _reachable(roots: list[Tensor], targets: set[Node]) -> set[Node]:
    """Those of the targets that a backward pass from the roots would come to."""
    queue = [get_gradient_edge(root).node for root in roots]
    seen = set(queue)
    while queue and not targets <= seen:
        for node, _ in queue.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                queue.append(node)
    return targets & seen
