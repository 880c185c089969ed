"""What launchers ask of the device and their tensors: architecture, precision, options; dtypes, layouts, alignment."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# GPUs for data centres: eight (A100), seven (H100), fourteen (B200) products in tf32 for one in fp32, by their data
# sheets. Others' matrix units take tf32 no faster than fp32 is taken without them.
_FAST_TF32 = ("sm_80", "sm_90", "sm_10", "sm_11")
# Triton 3.6 multiplies in plain tf32, for the matrix units of sm_100 and its kin, what it should multiply in "ieee".
_EXACT_ON_BLACKWELL = "ieee" if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else "tf32x3"


def cdiv(n: int, divisor: int) -> int:
    """`triton.cdiv`, which takes microseconds on the host."""
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    """The least power of two that is no less than a positive `n`."""
    return 1 << (n - 1).bit_length()


def jit_for_all_sizes(first: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` of a kernel that another size of image does not compile again.

    Its arguments are pointers, numbers that are compiled in where they are 1 or multiples of 16, numbers that are not,
    from `first` on, and annotated constants.
    """

    def jit(kernel: Callable[..., Any]) -> Any:
        numbers = [p.name for p in inspect.signature(kernel).parameters.values() if p.annotation is p.empty]
        return triton.jit(kernel, do_not_specialize=numbers[numbers.index(first) :])

    return jit


class Launch(NamedTuple):
    """All of a kernel's launch but its tensors, which a kernel takes first: what follows from sizes and strides."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self, *tensors: Any) -> None:
        self.kernel[self.grid](*tensors, *self.numbers, **self.constants)


def architecture(device: torch.device) -> str:
    """The key of the launchers' tables: "sm_80", "gfx942", ...; "interpreter" for a CPU tensor."""
    return _gpu_architecture(device) if device.type == "cuda" else "interpreter"


@cache
def _gpu_architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def warp_size(device: torch.device) -> int:
    """Threads of a warp (AMD: a wavefront)."""
    return 64 if architecture(device).startswith("gfx") else 32


def matrix_options(x: Tensor, threads: int = 256, registers: int = 255) -> dict[str, int | bool]:
    """Launch options of kernels of matrix products: threads of a program and the registers that each is held to.

    A multiprocessor has 65536 registers: 128 for each of 512 threads, 168 for each of three programs of 128. Older
    matrix units than Hopper's take whole operands in registers, which would not suffice.
    """
    target = architecture(x.device)
    options = {"num_warps": threads // (64 if target.startswith("gfx") else 32), "num_stages": 1}
    if target.startswith("sm_"):
        # Left alone, ptxas spills a few registers to fit one more program on a multiprocessor.
        options["maxnreg"] = 255
    if target.startswith(("sm_90", "sm_10", "sm_11")) and registers < 255:
        options |= {"num_stages": 2, "maxnreg": registers}
    return options | {"enable_fp_fusion": True}


def input_precision(x: Tensor, asked: str | None = None) -> str:
    """How a matrix product takes the numbers of `x` and fp32 numbers: "ieee", "tf32x3" or "tf32".

    As asked, else tf32 or exact as `torch.set_float32_matmul_precision` says. Half-precision numbers are exact in tf32.
    "tf32x3" rounds no worse than fp32 sums do, and stands for "ieee" where the compiler gets that wrong; it is taken
    where it is faster.
    """
    target = architecture(x.device)
    if target.startswith("gfx"):
        return "ieee"
    highest = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    exact = "tf32x3" if target.startswith(_FAST_TF32) else "ieee"
    precision = asked or (exact if highest else "tf32")
    return _EXACT_ON_BLACKWELL if precision == "ieee" and target.startswith(("sm_10", "sm_11")) else precision


def check_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is float32, float16 or bfloat16."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float32, float16 or bfloat16 for the Triton kernels, got {x.dtype}")


def is_channels_last(x: Tensor) -> bool:
    """Whether outputs for input `x` are channels_last."""
    return x.shape[1] > 1 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, *size: int) -> Tensor:
    """An uninitialised 4-D tensor: channels_last if `like` is, else contiguous."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def planes(x: Tensor) -> Tensor:
    """`x` (B, C, H, W) as (B, C, H * W) with neighbouring pixels next to each other, copied only if it must be."""
    x = x.flatten(2)
    return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()


def parameter_gradients(x: Tensor, parameters: tuple[Tensor | None, ...], needed: bool) -> tuple[Tensor, ...]:
    """What kernels write the parameters' gradients to: zero for an image `x` of no elements, empty if not needed or
    where there is no parameter."""
    make = torch.empty if x.numel() else torch.zeros
    return tuple(
        x.new_empty(0) if p is None or not needed else make(p.shape, dtype=p.dtype, device=p.device) for p in parameters
    )


def alike(first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors of which a program takes the first or the second: each pair in one dtype."""
    pairs = list(zip(first, second, strict=True))
    if all([p is None or p.dtype == q.dtype for p, q in pairs]):
        return first, second
    both = [(p, q) if p is None or p.dtype == q.dtype else (p.float(), q.float()) for p, q in pairs]
    return tuple(p for p, _ in both), tuple(q for _, q in both)


def alignment(lanes: int, lane_dim: int, tensors: list[Tensor]) -> int:
    """What divides the extent of dimension `lane_dim` and all strides but its own: 8 or 4, 16 bytes at most, else 1."""
    divisor = math.gcd(16 // min([t.element_size() for t in tensors]), lanes)
    for t in tensors:
        if lane_dim == t.dim() - 1 and t.is_contiguous():
            continue  # the strides are multiples of the extent
        for dim, (n, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
            if n > 1 and dim != lane_dim:
                divisor = math.gcd(divisor, stride)
    return divisor if divisor >= 4 else 1


def lane_first(x: Tensor | None, channels_last: bool) -> tuple[int, ...]:
    """Strides of lanes (columns, or channels of channels_last), of images, of the other of these two, and of rows."""
    if x is None:
        return 0, 0, 0, 0
    image, channel, row, column = x.stride()
    return (channel, image, column, row) if channels_last else (column, image, channel, row)


def channel_block(channels: int, most: int) -> int:
    """Channels that a program takes: a power of two that a matrix product can have, `most` at most."""
    return max(16, min(most, next_power_of_2(channels)))
