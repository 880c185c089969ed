"""Cases of an op: forward, and forward with backward, of the fast function against its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import swformer_fast as sf

from .harness import Case, Options, Run, Variant, Work, compiled, saved_bytes

Function = Callable[..., Tensor]

MAPS = [(1, 32, 256, 256), (4, 32, 128, 128), (1, 64, 128, 128), (1, 128, 64, 64), (1, 16, 1024, 1024), (2, 24, 63, 65)]
"""Shapes of what the operators on one map are timed on; the last, odd one is for --quick."""
COMPILED_MAPS = [(1, 32, 256, 256), (1, 128, 64, 64)]


def of_catalogue(op: str) -> tuple[Function, Function]:
    """An op that is no public function, and its definition."""
    return getattr(torch.ops.swformer_fast, op), sf.ops.CATALOGUE[op].forward


def branch_arguments(branch: Callable[[int], Any], shape: tuple[int, ...]) -> Sequence[Any]:
    """An image and the parameters of a branch, a little away from where they start."""
    parameters = branch(shape[1]).arguments()
    moved_away = [(p.detach() + 0.01 * torch.randn_like(p)).requires_grad_() for p in parameters]
    return torch.randn(shape, requires_grad=True), *moved_away


def as_fp64(args: Any) -> Any:
    def convert(arg: Any) -> Any:
        return arg.detach().double().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg

    return tree_map(convert, args)


def moved(args: Any, device: str) -> Any:
    """A nest of arguments with every tensor detached on `device`; requires_grad is kept."""

    def move(a: Any) -> Any:
        return a.detach().to(device).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a

    return tree_map(move, args)


def forward_run(function: Function, args: Sequence[Any]) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*args)

    return run


def train_run(function: Function, args: Sequence[Any], grad: Tensor) -> Run:
    """Output and the gradients of every tensor that requires one."""
    leaves = [a for a in tree_leaves(tuple(args)) if isinstance(a, Tensor) and a.requires_grad]

    def run() -> tuple[Tensor, ...]:
        output = function(*args)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    return run


def on_backend(name: str) -> Callable[[Run], Run]:
    """`run` on this backend; an op that cannot take it raises an error that says why."""

    def wrap(run: Run) -> Run:
        def run_on_backend() -> Any:
            with sf.use_backend(name):
                return run()

        return run_on_backend

    return wrap


def on_device(device: str) -> Callable[[Run], Run]:
    """On a GPU `on_backend("triton")`, so that nothing falls back to the reference unseen and is timed as ours."""
    return on_backend("triton" if device == "cuda" else "auto")


def backend_variants(run: Run, op: str, args: Sequence[Any], metrics: Mapping[str, Any]) -> dict[str, Variant]:
    """The fast function on every backend; those that cannot run here say why."""
    variants = {}
    fast = "triton" if tree_leaves(tuple(args))[0].is_cuda else "cpp"
    state = sf.backends()
    for backend in ("cpp", "triton"):
        if backend == fast and state[backend] == "available":
            variants[f"ours ({backend})"] = Variant(on_backend(backend)(run), ours=True, metrics=metrics)
        else:
            note = "no GPU" if backend == "triton" else f"{op}: {state[backend]}"
            variants[f"ours ({backend})"] = Variant(None, ours=True, note=note)
    return variants


def copy_floor(args: Sequence[Any]) -> dict[str, Variant]:
    """A plain copy of the image: what memory alone takes."""
    x = args[0].detach()
    return {"clone (bandwidth floor)": Variant(lambda: x.clone(), note="copies x only", compared=False)}


def op_cases(
    op: str,
    arguments: Callable[[tuple[int, ...]], Sequence[Any]],
    shapes: Sequence[tuple[int, ...]],
    options: Options,
    *,
    functions: tuple[Function, Function] | None = None,
    kinds: Sequence[str] = ("forward", "forward+backward"),
    targets: Callable[[str, tuple[int, ...]], Mapping[str, float]] = lambda kind, shape: {},
    peers: Callable[[Sequence[Any]], Mapping[str, Variant]] = lambda args: {},
    compile_shapes: Sequence[tuple[int, ...]] | None = None,
) -> list[Case]:
    """A case a shape and kind.

    arguments(shape): of the op, on the CPU, with requires_grad set where a gradient is wanted.
    functions: the fast one and its reference; those of the op's name if None.
    targets(kind, shape): the least ratios, e.g. {"reference": 5, "compile": 2}.
    compile_shapes: where --compile measures torch.compile, the first shape if None; --full does everywhere.
    """
    fast, reference = functions or (getattr(sf.functional, op), getattr(sf.reference, op))
    compile_shapes = shapes[:1] if compile_shapes is None else compile_shapes

    def work(shape: tuple[int, ...], kind: str) -> Work:
        torch.manual_seed(0)
        args = moved(tuple(arguments(shape)), options.device)
        train = kind == "forward+backward"
        with torch.no_grad():
            grad = torch.randn_like(reference(*args)) if train else torch.empty(0)

        def runner(function: Function) -> Run:
            return train_run(function, args, grad) if train else forward_run(function, args)

        def expected() -> Any:
            exact = as_fp64(args)
            return train_run(reference, exact, grad.double())() if train else forward_run(reference, exact)()

        def metrics(function: Function) -> dict[str, int]:
            leaves = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
            return {"saved_bytes": saved_bytes(lambda: function(*args), leaves[1:])} if train else {}

        variants = {"reference": Variant(runner(reference), metrics=metrics(reference))}
        if options.full or (shape in compile_shapes and options.compile):
            variants |= compiled(reference, lambda f: runner(f)())
        else:
            variants["compile"] = Variant(None, note="--compile measures torch.compile at some shapes, --full at all")
        variants |= backend_variants(runner(fast), op, args, metrics(fast))
        if not train:
            variants |= peers(args)
        return Work(variants, expected, targets(kind, shape))

    return [
        Case(f"{op} {kind} {'x'.join(map(str, shape))}", partial(work, shape, kind))
        for kind in kinds
        for shape in shapes
    ]


def module_run(model: nn.Module, x: Tensor, train: bool) -> Run:
    """A module in evaluation, or a training step of it."""
    parameters = list(model.parameters())

    def evaluate() -> Any:
        with torch.no_grad():
            return model(x)

    def step() -> Any:
        return torch.autograd.grad(model(x).sum(), parameters, allow_unused=True)

    return step if train else evaluate
