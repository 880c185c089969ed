"""Depthwise convolutions of 5 x 5 and 7 x 7, and of sizes that no kernel takes; 3 x 3 is in test_contract.py."""

import itertools

import pytest
import torch
from contract import DTYPES, KERNELS, arguments, check, needs_cpp, op_of, refusal
from helpers import LAYOUTS, SIZES, assert_close

import swformer_fast as sf
from swformer_fast.ops import CATALOGUE

NAMES = ("depthwise_gelu", "wavelet_mix")
needs_triton = pytest.mark.skipif("triton" not in KERNELS, reason="triton is not installed")


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (96, 1), (3, 200), (4, 65)])
@pytest.mark.parametrize("kernel", [5, 7])
@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str, kernel: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    with sf.use_backend("cpp"):
        check(name, arguments(name, 2, 3, *size, kernel=kernel, dtype=dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 16, 21])
@pytest.mark.parametrize("kernel", [5, 7])
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str, kernel: int, channels: int, layout: str, dtype: torch.dtype) -> None:
    with sf.use_backend("cpp"):
        check(name, arguments(name, 2, channels, 19, 37, kernel=kernel, dtype=dtype, layout=layout))


@needs_cpp
@pytest.mark.parametrize(("channels", "layout"), [(1, "contiguous"), (2, "contiguous"), (2, "channels_last")])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("name", NAMES)
def test_ranges_of_rows_meet(name: str, kernel: int, channels: int, layout: str) -> None:
    """Tall images are cut into ranges of rows that overlap by the kernel."""
    height, width = (531, 40) if channels == 1 else (402, 21)
    with sf.use_backend("cpp"):
        check(name, arguments(name, 1, channels, height, width, kernel=kernel, layout=layout))


@needs_cpp
@pytest.mark.parametrize("kernels", [*itertools.product([3, 5, 7], repeat=2)])
@pytest.mark.parametrize("size", [*SIZES, (2, 1), (3, 8), (6, 7)])
def test_local_branches(size: tuple[int, int], kernels: tuple[int, int]) -> None:
    args = arguments("local_branches", 2, 5, *size)
    for i, kernel in zip((3, 5), kernels, strict=True):
        weight = arguments("local_branches", 2, 5, *size, kernel=kernel)[i]
        args[i] = weight
    with sf.use_backend("cpp"):
        check("local_branches", args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [*NAMES, "local_branches", "multiscale_ffn"])
def test_other_sizes_fall_back(name: str, layout: str) -> None:
    args = arguments(name, 1, 2, 9, 8, kernel=9, layout=layout)
    assert_close(op_of(name)(*args), CATALOGUE[name].forward(*args))
    for backend in KERNELS:
        reason = refusal(name, backend, args)
        assert reason
        assert "3 x 3" in reason or "channels_last" in reason or "no Triton kernel" in reason


@needs_triton
def test_five_by_five_of_triton() -> None:
    args = arguments("wavelet_mix", 1, 2, 6, 7, kernel=5)
    with sf.use_backend("triton"):
        check("wavelet_mix", args)
    assert "3 x 3 only, got 5 x 5" in str(
        refusal("depthwise_gelu", "triton", arguments("depthwise_gelu", 1, 2, 6, 7, kernel=5))
    )
    assert "3 x 3, 5 x 5 only, got 7 x 7" in str(
        refusal("wavelet_mix", "triton", arguments("wavelet_mix", 1, 2, 6, 7, kernel=7))
    )
