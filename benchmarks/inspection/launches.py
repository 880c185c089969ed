"""The launches of every Triton kernel, by family: what is compiled for GPUs that need not be there, and interpreted.

Whoever adds a file of kernels adds a function that yields its launches, and an entry of LAUNCHES. A launch is written
once, for tensors of any kind: on the meta device it is compiled, on the CPU it is interpreted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Shape = tuple[int, int, int, int]
"""Batch, channels, height, width of the images."""


class Make(Protocol):
    """Makes the tensors of a launch."""

    def __call__(self, *size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Launch:
    """A call of a launcher."""

    name: str
    launcher: Callable[..., Any]
    args: tuple[Any, ...]
    main: bool = True
    """Whether every test run compiles and interprets it, or only the slow one."""
    width: int = 128
    """Bits of the widest access that the layout and the registers allow."""
    tensor_core: bool = False
    """Whether an NVIDIA target must use its matrix instructions, where they are faster."""


@dataclass(frozen=True)
class Family:
    """The launches of one file of kernels, and the images they are for."""

    launches: Callable[[Make, Shape], Iterator[Launch]]
    compiled: tuple[Shape, ...] = ((2, 40, 256, 256),)
    """Shapes that together reach every row of the file's static table; every test run compiles those of the first."""
    interpreted: tuple[Shape, Shape] = ((1, 8, 32, 64), (2, 9, 17, 31))
    """Small shapes, the second odd: the interpreter takes milliseconds for each operation of a program."""
    traffic: float | None = 1.1
    """Most bytes that a launch may load and store, over those of its tensors, at these small shapes; None for matrix
    products, whose operands are read many times."""


def meta(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False, offset: int = 0) -> Tensor:
    """A tensor with size and strides but no memory, that begins `offset` elements beyond a boundary of 16 bytes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = torch.empty(size, dtype=dtype, device="meta", memory_format=layout)
    return tensor.new_empty(tensor.numel() + offset).as_strided(size, tensor.stride(), offset)


def random(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """A tensor of normal numbers on the CPU."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(size).to(dtype).contiguous(memory_format=layout)


IMAGES = (
    ("fp32", torch.float32, False),
    ("bf16", torch.bfloat16, False),
    ("fp32 channels_last", torch.float32, True),
    ("bf16 channels_last", torch.bfloat16, True),
)


def _halves(shape: Shape) -> Shape:
    """The sub-bands of images."""
    batch, channels, height, width = shape
    return batch, 4 * channels, (height + 1) // 2, (width + 1) // 2


def _haar_dwt2d(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import haar_dwt2d

    taps, both, back = (make(2), make(2)), (True, True), haar_dwt2d.haar_dwt2d_backward
    for name, dtype, last in IMAGES:
        x, y = (make(*size, dtype=dtype, channels_last=last) for size in (shape, _halves(shape)))
        yield Launch(f"haar_dwt2d {name}", haar_dwt2d.haar_dwt2d, (x, *taps), not last)
        yield Launch(f"haar_dwt2d_backward {name}", back, (y, x, *taps, *both), not last)


def _haar_idwt2d(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import haar_idwt2d

    taps, both, back = (make(2), make(2)), (True, True), haar_idwt2d.haar_idwt2d_backward
    for name, dtype, last in IMAGES:
        x, y = (make(*size, dtype=dtype, channels_last=last) for size in (shape, _halves(shape)))
        yield Launch(f"haar_idwt2d {name}", haar_idwt2d.haar_idwt2d, (y, *taps, *shape[2:]), not last)
        yield Launch(f"haar_idwt2d_backward {name}", back, (x, y, *taps, *shape[2:], *both), not last)


def _depthwise_gelu(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import depthwise_gelu

    parameters = (make(shape[1], 1, 3, 3), make(shape[1]))
    for name, dtype, last in IMAGES:
        x, grad = (make(*shape, dtype=dtype, channels_last=last) for _ in range(2))
        width = 8 * x.element_size() if last else 128
        # As in a block, which takes the means of the branches.
        yield Launch(f"depthwise_gelu {name}", depthwise_gelu.depthwise_gelu, (x, *parameters, True), not last, width)
        backward = (grad, make(*shape[:2]), x, *parameters, True, True)
        yield Launch(
            f"depthwise_gelu_backward {name}", depthwise_gelu.depthwise_gelu_backward, backward, not last, width
        )


def _wavelet_mix(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import wavelet_mix

    bands = 4 * shape[1]
    for size in (3, 5):
        parameters = (make(bands, 1, size, size), make(bands), *(make(2) for _ in range(4)))
        for name, dtype, last in IMAGES:
            x, grad = (make(*shape, dtype=dtype, channels_last=last) for _ in range(2))
            label = f"{size}x{size} {name}"
            main, width = label == "3x3 fp32", 128 if size == 3 else 16 * x.element_size()
            width = 8 * x.element_size() if last else width
            yield Launch(f"wavelet_mix {label}", wavelet_mix.wavelet_mix, (x, *parameters, True), main, width)
            backward, back = (grad, make(*shape[:2]), x, *parameters, True), wavelet_mix.wavelet_mix_backward
            yield Launch(f"wavelet_mix_backward {label}", back, (*backward, True), main, width)
            yield Launch(f"wavelet_mix_backward {label} x", back, (*backward, False), False, width)


def _only_tensors(launcher: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    return lambda *arguments: [t for t in tree_leaves(launcher(*arguments)) if isinstance(t, Tensor)]


def _fourier_mix(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import _algebra, _spectrum

    batch, dim, height, width = shape
    channels, area, double = 2 * dim, height * width, torch.float64
    spectrum, grad = (make(batch, dim, height, width // 2 + 1, 2) for _ in range(2))
    matrix = make(2 * channels, 2 * dim + 2)
    mixing = (spectrum, matrix, make(dim, dim), make(dim), width, 1.0)
    for precision in ("ieee", "tf32x3", "tf32"):
        wanted, products = precision != "tf32x3", precision != "ieee"
        yield Launch(f"spectrum_mix {precision}", _spectrum.spectrum_mix, (*mixing, precision), wanted, 128, products)
        back, flags = _spectrum.spectrum_mix_backward, (True, True, precision)
        yield Launch(f"spectrum_mix_backward {precision}", back, (grad, *mixing, *flags), not products, 64, products)
    # As in a block, which folds the last convolution into another one.
    alone = (spectrum, matrix, None, None, width, 1.0)
    yield Launch("spectrum_mix alone", _spectrum.spectrum_mix, alone, True, 128, True)
    yield Launch("spectrum_mix_backward alone", back, (grad, *alone, True, True), False, 64, True)
    yield Launch("spectrum_moments", _spectrum.spectrum_moments, (spectrum,))
    through = (grad, spectrum, make(dim, 2 * (dim + 1) + batch), width)
    yield Launch("spectrum_moments_backward", _spectrum.spectrum_moments_backward, through)

    def parameters(dtype: torch.dtype) -> tuple[Tensor, ...]:
        factors = [
            (
                make(channels, dtype=dtype),
                make(channels, dtype=dtype).abs(),
                make(channels),
                make(channels),
                make(channels, channels),
                make(channels),
            )
            for _ in range(2)
        ]
        return (make(channels, dim), make(channels), *factors[0], *factors[1])

    moments = make(2, dim, dim + 1, dtype=double)
    compose, compose_back = _only_tensors(_algebra.compose), _only_tensors(_algebra.compose_backward)
    yield Launch("compose", compose, (1e-5, area, parameters(torch.float32), spectrum))
    yield Launch("compose batch", compose, (1e-5, area, parameters(torch.float32), spectrum, moments, True))
    for name, dtype, kept in (
        ("compose_backward", torch.float32, ()),
        ("compose_backward batch", double, (make(2, channels, dim, dtype=double), make(batch, channels, dtype=double))),
    ):
        parts = parameters(dtype)
        composed = _algebra.Composed(matrix, None, (parts[2:8], parts[8:]), *(kept or (None, None)))
        arguments = (matrix, composed, 1e-5, area, parts, spectrum, moments if kept else None)
        yield Launch(name, compose_back, arguments)


def _pointwise(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import pointwise

    batch, dim, *_ = shape
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x, y, z, residual = (make(*shape, dtype=dtype) for _ in range(4))
        main = dtype == torch.float32
        three = (x, y, z, make(batch, dim, 3 * dim), make(dim), residual)
        stacked = make(batch, 3 * dim, *shape[2:], dtype=dtype)
        one = (x, None, None, make(1, 3 * dim, dim), make(3 * dim), None)
        yield Launch(f"pointwise 3 maps {name}", pointwise.pointwise, three, main, 128, True)
        yield Launch(f"pointwise 1 map {name}", pointwise.pointwise, one, False, 128, True)
        back = pointwise.pointwise_backward
        yield Launch(f"pointwise_backward 3 maps {name}", back, (residual, *three[:5], True, True), main, 128, True)
        yield Launch(f"pointwise_backward 1 map {name}", back, (stacked, *one[:5], True, True), False, 128, True)


def _channel_attention(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import channel_attention

    channels, hidden = shape[1], max(1, shape[1] // 4)
    parameters = (make(hidden, channels, 1, 1), make(hidden), make(channels, hidden, 1, 1), make(channels))
    for name, dtype, last in IMAGES:
        x, grad = (make(*shape, dtype=dtype, channels_last=last) for _ in range(2))
        yield Launch(f"channel_attention {name}", channel_attention.channel_attention, (x, *parameters), name == "fp32")
        backward = (grad, x, *parameters, True, True)
        yield Launch(
            f"channel_attention_backward {name}", channel_attention.channel_attention_backward, backward, name == "fp32"
        )


def _fold_norm(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import fold_norm

    dim = shape[1]
    nothing = (None,) * 4
    norm, then = (make(dim), make(dim).abs(), make(dim), make(dim)), (make(2 * dim, dim), make(2 * dim), None)
    for name, arguments, outputs, inputs in (
        ("norm and convolution", (make(3 * dim, dim), make(3 * dim), *norm, *then), 4 * dim, dim),
        ("convolution", (make(3 * dim, dim), make(3 * dim), *nothing, *then), 4 * dim, dim),
        ("scale", (make(dim, 3 * dim), make(dim), *nothing, None, None, make(dim)), dim, 3 * dim),
    ):
        grad = make(outputs * (inputs + 1))
        yield Launch(f"fold_norm {name}", fold_norm.fold_norm, (*arguments, 1e-5), True, 32)
        backward = (grad, *arguments, 1e-5, True)
        yield Launch(f"fold_norm_backward {name}", fold_norm.fold_norm_backward, backward, True, 32)


def _fold_attention(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import fold_attention

    batch, dim, height, width = shape
    hidden = max(1, 3 * dim // 4)
    sums = tuple(make(batch, dim) for _ in range(3))
    attention = (make(hidden, 3 * dim), make(hidden), make(3 * dim, hidden) / hidden, make(3 * dim))
    last = (make(dim, dim), make(dim), make(dim, 3 * dim), make(dim), make(dim))
    arguments = (*sums, *attention, *last, height * width)
    yield Launch("fold_attention", fold_attention.fold_attention, arguments, True, 32)
    backward = (make(batch * dim * (3 * dim + 1)), *arguments, True)
    yield Launch("fold_attention_backward", fold_attention.fold_attention_backward, backward, True, 32)


def _multiscale_ffn(make: Make, shape: Shape) -> Iterator[Launch]:
    from swformer_kernels import multiscale_ffn

    dim = shape[1]
    depthwise = (make(*size) for _ in range(3) for size in ((dim, 1, 3, 3), (dim,)))
    parameters = (make(3 * dim, dim, 1, 1), make(3 * dim), *depthwise, make(dim, 3 * dim, 1, 1), make(dim))
    for name, dtype, last in IMAGES:
        x, grad = (make(*shape, dtype=dtype, channels_last=last) for _ in range(2))
        main = name == "fp32"
        # Neighbouring columns, and samples of the other scales, are not aligned.
        width = 8 * x.element_size()
        yield Launch(f"multiscale_ffn {name}", multiscale_ffn.multiscale_ffn, (x, *parameters), main, width, True)
        backward = (grad, x, *parameters, True, True)
        yield Launch(
            f"multiscale_ffn_backward {name}", multiscale_ffn.multiscale_ffn_backward, backward, main, width, True
        )


LAUNCHES: dict[str, Family] = {
    "haar_dwt2d": Family(_haar_dwt2d, compiled=((2, 40, 256, 256), (1, 16, 256, 256))),
    "haar_idwt2d": Family(_haar_idwt2d, compiled=((2, 40, 256, 256), (1, 16, 256, 256))),
    "depthwise_gelu": Family(_depthwise_gelu, compiled=((2, 40, 256, 256), (2, 40, 64, 64)), traffic=1.35),
    "wavelet_mix": Family(
        _wavelet_mix,
        compiled=((2, 40, 256, 256), (2, 40, 64, 64)),
        interpreted=((1, 4, 64, 32), (1, 5, 17, 31)),
        traffic=1.35,
    ),
    "pointwise": Family(
        _pointwise,
        compiled=tuple((2, dim, 256, 256) for dim in (40, 16, 96)),
        interpreted=((1, 8, 8, 16), (2, 5, 7, 9)),
        traffic=None,
    ),
    "channel_attention": Family(_channel_attention, compiled=((2, 120, 256, 256), (2, 192, 64, 64)), traffic=1.6),
    "fold_norm": Family(
        _fold_norm,
        compiled=tuple((2, dim, 256, 256) for dim in (40, 16, 96)),
        interpreted=((1, 40, 16, 32), (2, 33, 7, 9)),
        traffic=None,
    ),
    "fold_attention": Family(
        _fold_attention,
        compiled=tuple((2, dim, 256, 256) for dim in (40, 16, 96)),
        interpreted=((1, 40, 16, 32), (2, 33, 7, 9)),
        traffic=None,
    ),
    "multiscale_ffn": Family(
        _multiscale_ffn,
        compiled=tuple((2, dim, 256, 256) for dim in (40, 16, 96)),
        interpreted=((1, 4, 16, 32), (1, 3, 7, 9)),
        traffic=None,
    ),
    "fourier_mix": Family(
        _fourier_mix,
        compiled=tuple((2, dim, 256, 256) for dim in (40, 64, 96)),
        interpreted=((1, 8, 16, 32), (2, 5, 7, 9)),
        traffic=None,
    ),
}
"""For each file of kernels, launches that together reach every kernel in it."""


def main() -> None:
    """Launch on the GPU: every main launch of the families named, or of all, once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection.launches", description=main.__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(LAUNCHES)} (default: all)")
    parser.add_argument("--real", action="store_true", help="at the size of real images, not at a small odd one")
    parser.add_argument("--dry-run", action="store_true", help="interpreted on the CPU")
    parser.add_argument("--list", action="store_true", help="name the families and stop")
    args = parser.parse_args()
    if args.list:
        print("\n".join(LAUNCHES))
        return
    if args.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")

    def make(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        made = random(*size, dtype=dtype, channels_last=channels_last)
        return made if args.dry_run else made.cuda()

    for family in [LAUNCHES[name] for name in args.families or LAUNCHES]:
        for launch in family.launches(make, family.compiled[0] if args.real else family.interpreted[1]):
            if launch.main:
                launch.launcher(*launch.args)
                print(launch.name, flush=True)
    if not args.dry_run:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
