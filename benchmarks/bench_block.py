"""swformer_block: one block, evaluation and training step: time, bytes kept for backward and operators called."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import swformer_fast as sf

from .harness import Case, Options, Run, Variant, Work, compiled, saved_bytes
from .models import beside, image_as_asked, models, randomise
from .op_cases import on_device

EVAL = [(1, 40, 256, 256), (1, 64, 128, 128)]
TRAIN = [(4, 40, 128, 128)]
TARGETS = {
    ("eval", 40): {"reference": 4.0, "compile": 3.5},
    ("eval", 64): {"reference": 2.7, "compile": 2.2},
    ("train step", 40): {"reference": 2.5, "compile": 2.3},
}


class CountCalls(TorchDispatchMode):
    """Counts operators that compute; views and allocations are free."""

    FREE = ("view", "reshape", "split", "slice", "expand", "permute", "transpose", "t.", "empty", "detach", "unsqueeze")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".", 1)[1]
        self.count += not name.startswith(self.FREE)
        return func(*args, **(kwargs or {}))


def count_calls(run: Run) -> int:
    with CountCalls() as counter:
        run()
    return counter.count


def block(shape: tuple[int, ...], kind: str, options: Options) -> Work:
    torch.manual_seed(0)
    dim, train = shape[1], kind == "train step"
    reference = sf.reference.SWFormerBlock(dim)
    randomise(reference, 0.1)
    for scale in (reference.beta, reference.gamma):
        scale.data.normal_()  # small ones would hide an error behind the residual
    same = models(reference, partial(sf.SWFormerBlock, dim), options, train)
    x, grad = (image_as_asked(torch.randn(shape, device=options.device), options) for _ in range(2))

    def step(model: nn.Module, call: Any = None, x: Tensor = x, grad: Tensor = grad) -> Run:
        call = model if call is None else call

        def evaluate() -> Any:
            with torch.no_grad():
                return call(x)

        def train_step() -> Any:
            leaf = x.detach().requires_grad_()
            output = call(leaf)
            return output.detach(), torch.autograd.grad(output, (leaf, *model.parameters()), grad)[0]

        return train_step if train else evaluate

    def metrics(model: nn.Module) -> dict[str, int]:
        kept = {}
        if train:
            leaf = x.detach().requires_grad_()
            kept["saved_bytes"] = saved_bytes(lambda: model(leaf), list(model.parameters()))
        return kept | {"operators": count_calls(step(model))}

    def plain(model: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
        return step(model, x=x.to(dtype).contiguous(), grad=grad.to(dtype).contiguous())

    variants = {"reference": Variant(step(same.reference), metrics=metrics(same.reference))}
    if not (options.compile or options.full):
        variants["compile"] = Variant(None, note="--compile measures torch.compile")
    else:
        variants |= compiled(same.reference.forward, lambda f: step(same.reference, f)())
    ours = on_device(options.device)
    variants["ours"] = Variant(ours(step(same.ours)), ours=True, metrics=metrics(same.ours))
    variants |= beside(same, plain, options)
    return Work(variants, plain(same.exact, torch.float64), {} if options.words else TARGETS.get((kind, dim), {}))


def cases(options: Options) -> list[Case]:
    shapes = [("eval", (1, 16, 32, 32)), ("train step", (1, 16, 32, 32))]
    if not options.quick:
        shapes = [("eval", shape) for shape in EVAL] + [("train step", shape) for shape in TRAIN]
    return [
        Case(f"block {kind} {'x'.join(map(str, shape))}", partial(block, shape, kind, options))
        for kind, shape in shapes
    ]
