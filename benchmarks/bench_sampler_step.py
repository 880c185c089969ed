"""The sampler's arithmetic: a scheduler's pass over model outputs, guidance included, and the shortcut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sdo_fast
from sdo_fast.solver import Solver
from sdo_fast.steppers import FusedStepper, SchedulerStepper, Stepper

from .harness import Case, Options, Variant, Work

STEPS = 20
SHAPES = [(1, 4, 64, 64), (4, 4, 128, 128)]
GUIDANCE = 5.0
TARGETS = {"DDIM": 10.0, "UniPC": 20.0}
"""Least ratio over the scheduler's step, without guidance."""


def schedulers() -> dict[str, Any]:
    import diffusers

    return {
        "DDIM": diffusers.DDIMScheduler(clip_sample=False),
        "DPM++ 2M": diffusers.DPMSolverMultistepScheduler(),
        "UniPC": diffusers.UniPCMultistepScheduler(),
    }


def variants_of(run: Callable[[], Any], options: Options, plain: str) -> dict[str, Variant]:
    """`run` on each backend; the reference backend under the name `plain`."""

    def on(backend: str) -> Callable[[], Any]:
        def run_on_backend() -> Any:
            with sdo_fast.use_backend(backend):
                return run()

        return run_on_backend

    state = sdo_fast.backends()
    fast = "cuda" if options.device == "cuda" else "cpp"
    variants = {plain: Variant(on("reference"))}
    for backend in ("cpp", "cuda"):
        runs = backend == fast and state[backend] == "available"
        note = "" if runs else "no GPU" if backend == "cuda" else state[backend]
        variants[f"ours ({backend})"] = Variant(on(backend) if runs else None, ours=True, note=note)
    return variants


def scheduler_pass(name: str, shape: tuple[int, ...], guided: bool, options: Options) -> Work:
    """A pass of STEPS steps. The scheduler's includes its copy for the pass, some percent of it."""
    torch.manual_seed(0)
    solver = Solver(schedulers()[name], STEPS)
    weight = GUIDANCE if guided else None
    x = torch.randn(shape).to(options.device)
    pair = [tuple(torch.randn(shape).to(options.device) for _ in range(1 + guided)) for _ in range(2)]
    outputs = pair * (STEPS // 2)  # two sets in turn: a model's output has just been written, so it is in the cache

    @torch.no_grad()
    def sample(stepper: Stepper, x: Tensor, outputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
        run = stepper.begin()
        for i in solver.steps:
            run.scale_input(x, i)
            x = run.step(outputs[i], weight, i, x)
        return x

    scheduler, fused = SchedulerStepper(solver), FusedStepper(solver)
    operands = sum(3 + guided + len(rule.scales) for rule in fused.recurrences.values())

    def by_copies() -> Tensor:
        """Moves the bytes that the steps must move, into memory as fresh as their result's."""
        sink = torch.empty_like(x)
        for k in range(operands // 2):
            sink.copy_(outputs[k % STEPS][0])
        return sink

    def expected() -> Tensor:
        return sample(scheduler, x.double(), [tuple(t.double() for t in halves) for halves in outputs])

    variants = {"scheduler": Variant(lambda: sample(scheduler, x, outputs))}
    variants |= variants_of(lambda: sample(fused, x, outputs), options, "sampler_step in plain PyTorch")
    variants["copies of as many bytes (floor)"] = Variant(by_copies, compared=False)
    return Work(variants, expected, {"scheduler": TARGETS[name]} if name in TARGETS and not guided else {})


def shortcut(shape: tuple[int, ...], options: Options) -> Work:
    """Guided cotangents into one buffer, against the three products in plain PyTorch."""
    torch.manual_seed(0)
    grad = torch.randn(shape).to(options.device)
    direct, both = torch.empty_like(grad), torch.empty(2 * shape[0], *shape[1:], device=options.device)
    uncond, cond = both.chunk(2)
    a, b = 157.0, -12.5

    def plain(grad: Tensor) -> tuple[Tensor, Tensor]:
        through = b * grad
        return a * grad, torch.cat([(1 - GUIDANCE) * through, GUIDANCE * through])

    def run() -> tuple[Tensor, Tensor]:
        sdo_fast.functional.shortcut_backward(grad, a, b, GUIDANCE, out=(direct, cond, uncond))
        return direct, both

    variants = {"plain PyTorch": Variant(lambda: plain(grad))}
    ours = variants_of(run, options, "reference")
    return Work(variants | {name: v for name, v in ours.items() if v.ours}, lambda: plain(grad.double()))


def cases(options: Options) -> list[Case]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    passes = [
        Case(
            f"{name} {'guided ' if guided else ''}{'x'.join(map(str, shape))}",
            partial(scheduler_pass, name, shape, guided, options),
        )
        for name in ("DDIM", "DPM++ 2M", "UniPC")
        for guided in (False, True)
        for shape in shapes
    ]
    cotangents = [Case(f"shortcut {'x'.join(map(str, s))}", partial(shortcut, s, options)) for s in shapes]
    return passes + cotangents
