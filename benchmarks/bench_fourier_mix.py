"""Fourier branch: evaluation, training step, and the stages of evaluation by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import swformer_fast as sf

from .harness import Case, Options, Variant, Work
from .op_cases import op_cases

SHAPES = [
    (1, 16, 256, 256),
    (1, 32, 256, 256),
    (1, 40, 256, 256),
    (1, 64, 128, 128),
    (1, 128, 64, 64),
    (1, 40, 512, 512),
    (1, 16, 1024, 1024),
]


def targets(kind: str, shape: tuple[int, ...]) -> Mapping[str, float]:
    dim = shape[1]
    if shape not in SHAPES:
        return {}
    if kind == "forward+backward":
        return {"reference": 2.6 if dim <= 40 else 1.9 if dim <= 64 else 1.25}
    reference, compiled = (2.6, 2.5) if dim <= 40 else (2.4, 2.2) if dim <= 64 else (1.9, 1.8)
    return {"reference": reference, "compile": compiled}


def arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    parameters, *_ = sf.reference.FourierBranch(shape[1]).eval().arguments()
    return torch.randn(shape, requires_grad=True), parameters


def in_mode(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Evaluation where no gradient is recorded, training where one is."""

    @wraps(function)
    def run(*args: Any) -> Tensor:
        return function(*args, training=torch.is_grad_enabled())

    return run


def stages(shape: tuple[int, ...]) -> Work:
    """What the branch in evaluation is made of; values are compared in the other cases."""
    torch.manual_seed(0)
    x, parameters = tree_map(torch.detach, arguments(shape))
    note = sf.backends()["cpp"]
    if note != "available":
        return Work({"branch": Variant(None, note=note)})
    kernels = torch.ops._swformer_fast
    height, width = shape[2:]

    spectrum, frequencies = kernels.rfft2(x), shape[0] * height * (width // 2 + 1)
    matrix, out_weight = torch.randn(2 * len(parameters.in_bias), 2 * (shape[1] + 1)), parameters.out_weight.flatten(1)
    complex_spectrum = torch.fft.rfft2(torch.randn(shape))
    columns, products = torch.randn(matrix.shape[1], frequencies), torch.randn(out_weight.shape[1], 2 * frequencies)

    def part(run: Callable[[], Any], note: str) -> Variant:
        def without_gradient() -> Any:
            with torch.no_grad():
                return run()

        return Variant(without_gradient, note=note, compared=False)

    return Work(
        {
            "branch": part(lambda: sf.functional.fourier_mix(x, parameters), "all stages"),
            "rfft2": part(lambda: kernels.rfft2(x), "transform"),
            "torch.fft.rfft2": part(lambda: torch.fft.rfft2(x, norm="ortho"), "PyTorch's"),
            "products": part(lambda: (matrix @ columns, out_weight @ products), "mix's matrix products by sgemm alone"),
            "irfft2": part(lambda: kernels.irfft2(spectrum, None, x), "inverse transform"),
            "torch.fft.irfft2": part(
                lambda: torch.fft.irfft2(complex_spectrum, s=(height, width), norm="ortho"), "PyTorch's"
            ),
        }
    )


def cases(options: Options) -> list[Case]:
    shapes = [(2, 6, 23, 30)] if options.quick else SHAPES
    branch = op_cases(
        "fourier_mix",
        arguments,
        shapes,
        options,
        functions=(in_mode(sf.functional.fourier_mix), in_mode(sf.reference.fourier_mix)),
        targets=targets,
        compile_shapes=[(1, 40, 256, 256), (1, 64, 128, 128), (1, 128, 64, 64)],
    )
    if options.gpu is not None:
        return branch  # the stages are those of the C++ kernels
    return branch + [
        Case(f"fourier_mix stages {'x'.join(map(str, shape))}", partial(stages, shape)) for shape in shapes
    ]
