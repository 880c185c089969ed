"""The network and its exits on a real photograph, scikit-learn's china.jpg: reference against ours."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import swformer_fast as sf

from .harness import HALF, LAYOUTS, Case, Options, Run, Variant, Work, compiled
from .models import Models, beside, image_as_asked, models, randomise
from .op_cases import on_device

PRESET, TRAINED = "derain", "tiny"
TARGETS = {"reference": 3.5, "compile": 3.0}


def photograph(side: int) -> Tensor:
    """The top left square of china.jpg, mirrored where it ends: (1, 3, side, side) in [0, 1]."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    for dim in (2, 3):
        while image.shape[dim] < side:
            image = torch.cat((image, image.flip(dim)), dim)
    return image[:, :, :side, :side].contiguous()


def same_weights(preset: str, exit: str, options: Options, train: bool) -> Models:
    torch.manual_seed(0)
    reference = sf.reference.SWFormer.from_preset(preset, exit).eval()
    randomise(reference, 0.02)
    return models(reference, partial(sf.SWFormer.from_preset, preset, exit), options, train)


def by_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of the model whose blocks are compiled, one code for all of a width, with both layout settings.

    The network in one piece compiles for minutes.
    """
    copies = {}
    for name, layout in LAYOUTS.items():
        copies[name] = copy.deepcopy(model)
        for block in copies[name].modules():
            if isinstance(block, sf.reference.SWFormerBlock):
                block.compile(dynamic=False, options={"layout_optimization": layout})
    return copies


def resident_peak(model: nn.Module, exit: str, side: int, options: Options) -> int | None:
    """Memory that one evaluation needs beyond what is there before it, in a separate process; Linux."""
    kind = "sf.SWFormer" if isinstance(model, sf.SWFormer) else "sf.reference.SWFormer"
    program = f"""
import re, torch, swformer_fast as sf
from benchmarks.bench_network import photograph
from benchmarks.harness import Options
from benchmarks.models import image_as_asked, model_as_asked
torch.set_num_threads(1)
options = Options(dtype="{options.dtype}", layout="{options.layout}")
model = model_as_asked({kind}.from_preset("{PRESET}", "{exit}").eval(), options)
image = image_as_asked(photograph({side}), options)
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "autocast"):
    model(image[..., :64, :64])  # loads what is loaded once
    open("/proc/self/clear_refs", "w").write("5")  # begins the high-water mark anew
    before = status("VmRSS")
    model(image)
print(status("VmHWM") - before)
"""
    if sys.platform != "linux":
        return None
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def runtimes(model: nn.Module, call: Callable[[Callable[[Tensor], Tensor]], Any]) -> dict[str, Variant]:
    """Those that are installed, on examples/export_onnx.py's file, where Fourier transforms are matrix products."""
    folder = str(Path(__file__).parent.parent / "examples")
    sys.path.append(folder)  # whose scripts import one another
    try:
        onnx = importlib.import_module("export_onnx")
    except ImportError as error:
        return {"ONNX": Variant(None, note=str(error))}
    finally:
        sys.path.remove(folder)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "network.onnx"
        onnx.export(model, path)
        return {name: Variant(partial(call, run)) for name, run in onnx.runtimes(path)}


def network(exit: str, side: int, options: Options) -> Work:
    same = same_weights(PRESET, exit, options, train=False)
    image = image_as_asked(photograph(side), options)

    def call(model: Callable[[Tensor], Tensor], x: Tensor = image) -> Tensor:
        """What the network adds to the image: the image itself would hide an error in the comparison.

        In half precision the result itself, of which that is a tenth: rounding the sum would be most of its error.
        """
        with torch.no_grad():
            return model(x) if options.dtype in HALF else model(x) - x

    def plain(model: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
        return partial(call, model, image.to(dtype).contiguous())

    def metrics(model: nn.Module) -> dict[str, int]:
        peak = resident_peak(model, exit, side, options) if options.device == "cpu" else None
        return {} if peak is None else {"peak_bytes": peak}

    variants = {"reference": Variant(partial(call, same.reference), metrics=metrics(same.reference))}
    if options.compile and options.device == "cuda":
        variants |= {name: Variant(partial(call, m)) for name, m in by_blocks(same.reference).items()}
    elif options.compile and side <= 256 and exit == "small":
        variants |= compiled(same.reference, call)
    else:
        note = "compiling the network takes minutes; --compile does it for the exit small at 256x256"
        variants["compile"] = Variant(None, note=note)
    ours = on_device(options.device)
    variants["ours"] = Variant(ours(partial(call, same.ours)), ours=True, metrics=metrics(same.ours))
    if options.full and exit == "small" and side == 256 and options.device == "cpu" and not options.words:
        variants |= runtimes(same.ours, call)
    variants |= beside(same, plain, options)
    return Work(variants, plain(same.exact, torch.float64), {} if options.words else TARGETS)


def train_step(batch: int, side: int, options: Options) -> Work:
    """Forward with the squared error of every exit, whose gradient rounding cannot flip, and all gradients."""
    same = same_weights(TRAINED, "large", options, train=True)
    crops = photograph(side * batch)[..., :side].reshape(1, 3, batch, side, side)[0].transpose(0, 1).contiguous()
    target = image_as_asked(crops, options)
    image = (target + 0.1 * torch.randn_like(target)).clamp(0, 1)

    def step(model: Any, image: Tensor = image, target: Tensor = target) -> Run:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def run() -> tuple[Tensor, ...]:
            outputs, targets = model(image, all_scales=True), model.image_pyramid(target)
            loss = sum((o - t).square().mean() for o, t in zip(outputs, targets, strict=True))
            grads = torch.autograd.grad(loss, parameters)
            return outputs[-1].detach() - image, torch.cat([g.flatten() for g in grads])

        return run

    def plain(model: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
        return step(model, image.to(dtype).contiguous(), target.to(dtype).contiguous())

    variants = {"reference": Variant(step(same.reference))}
    if options.compile and options.device == "cuda":
        variants |= {name: Variant(step(m)) for name, m in by_blocks(same.reference).items()}
    else:
        variants["compile"] = Variant(None, note="compiling the network's backward takes many minutes")
    variants["ours"] = Variant(on_device(options.device)(step(same.ours)), ours=True)
    variants |= beside(same, plain, options)
    return Work(variants, plain(same.exact, torch.float64), {} if options.words else {"reference": 2.5})


def cases(options: Options) -> list[Case]:
    sizes = [("small", 256), ("large", 256)]
    if options.quick:
        sizes = [("small", 64)]
    elif options.compile or options.full:
        sizes += [("medium", 256), ("small", 512), ("small", 1024)][: 2 + options.full]
    batch, side = (2, 32) if options.quick else (4, 128)
    evaluation = [Case(f"{PRESET}, {exit} eval {n}x{n}", partial(network, exit, n, options)) for exit, n in sizes]
    if options.dtype in HALF:  # networks are trained under autocast
        return evaluation
    return [*evaluation, Case(f"{TRAINED} train step {batch}x{side}x{side}", partial(train_step, batch, side, options))]
