"""The spatial and the wavelet branch behind their 1x1 convolution in one pass, against the three ops in fp64."""

import pytest
import torch
from helpers import LAYOUTS, SIZES, TOLERANCE, assert_close, fp64, poisoned_memory, rel_rms
from torch import Tensor

import swformer_fast as sf
from swformer_fast import fusion
from swformer_fast.parameters import Convolution, SpatialParameters, WaveletParameters

pytestmark = pytest.mark.skipif(sf.backends()["cpp"] != "available", reason="the extension is not built")
local_branches = torch.ops.swformer_fast.local_branches
definition = sf.backend.OPS["local_branches"].reference


def arguments(
    *shape: int, channels: int = 0, kernels: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """An image and the parameters: of the convolution, the spatial branch and the wavelet branch."""
    dim, wide = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
    channels = channels or dim
    sizes = ((2 * channels, dim), (2 * channels,), (channels, 1, *2 * kernels[:1]), (channels,))
    sizes = (*sizes, (4 * channels, 1, *2 * kernels[1:]), (4 * channels,), *4 * ((2,),))
    # Means that are not 0: the sums must hold more than rounding errors.
    return [torch.randn(shape, dtype=wide).add(0.5).to(dtype), *(torch.randn(s, dtype=wide) + 0.2 for s in sizes)]


def check(args: list[Tensor]) -> None:
    dtype = args[0].dtype
    with poisoned_memory():
        actual = local_branches(*args)
    expected = definition(*fp64(args))
    assert [t.dtype for t in actual[:2]] == [dtype, dtype]
    assert_close(actual[:2], expected[:2], dtype)
    for y, actual_sums, sums in zip(expected, actual[2:], expected[2:], strict=False):
        # Positive and negative pixels cancel in a sum, their rounding errors do not.
        size = y.abs().sum((2, 3))
        assert (actual_sums - sums).abs().max() <= TOLERANCE[dtype] * size.max()


@pytest.mark.parametrize("kernels", [(3, 3), (3, 5), (5, 3), (5, 5), (7, 3), (5, 7), (7, 7)])
@pytest.mark.parametrize("size", [*SIZES, (2, 1), (3, 8), (6, 7)])
def test_sizes_and_kernels(size: tuple[int, int], kernels: tuple[int, int]) -> None:
    check(arguments(2, 5, *size, channels=4, kernels=kernels))


@pytest.mark.parametrize("shape", [(1, 3, 300, 11), (1, 40, 70, 256), (3, 2, 65, 1100), (1, 8, 200, 37)])
def test_strips_and_tasks(shape: tuple[int, ...]) -> None:
    """Images of many strips, the last of them short, and of several tasks."""
    check(arguments(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(arguments(2, 6, 19, 22, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x, *parameters = arguments(2, 4, 9, 20)
    x = LAYOUTS[layout](x)
    actual, expected = local_branches(x, *parameters), definition(*fp64((x, *parameters)))
    assert_close(actual, expected, torch.float32)
    assert actual[0].is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )


def test_empty_batch() -> None:
    assert [t.shape for t in local_branches(*arguments(0, 3, 8, 9))] == [(0, 3, 8, 9)] * 2 + [(0, 3)] * 2


def test_same_bits_for_every_number_of_threads() -> None:
    args = arguments(1, 3, 300, 70)
    one = local_branches(*args)
    torch.set_num_threads(3)
    try:
        three = local_branches(*args)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_other_kernels_take_the_ops() -> None:
    args = arguments(1, 3, 8, 9, kernels=(9, 3))
    assert "3 x 3, 5 x 5, 7 x 7 only, got 9 x 9" in sf.why_not("local_branches", *args)
    assert_close(local_branches(*args), definition(*fp64(args)), torch.float32)


def test_opcheck_and_compile() -> None:
    args = arguments(2, 3, 9, 12)
    torch.library.opcheck(
        local_branches, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x, *rest: local_branches(x.sin(), *rest)[2].cos(), fullgraph=True)(*args)
    assert_close(compiled, local_branches(args[0].sin(), *args[1:])[2].cos())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_with_and_without_gradients(dtype: torch.dtype) -> None:
    block = sf.SWFormerBlock(6).to(dtype).eval()
    x = torch.randn(2, 6, 33, 48, dtype=dtype)
    calls: list[str] = []

    def names(record: bool) -> list[str]:
        with torch.set_grad_enabled(record), torch.profiler.profile() as profile:
            results.append(block(x).detach())
        calls.extend(event.key for event in profile.key_averages() if "local_branches" in event.key)
        return calls

    results: list[Tensor] = []
    assert not names(True)
    assert names(False)
    assert rel_rms(*results) < (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (5, 2), r"conv.weight must have shape \(6, 2\), got \(5, 2\)"),
        (1, (5,), r"conv.bias must have shape \(6,\), got \(5,\)"),
        (3, (4,), r"spatial.bias must have shape \(3,\), got \(4,\)"),
        (4, (3, 1, 3, 3), r"wavelet.weight must have shape \(12, 1, 3, 3\), got \(3, 1, 3, 3\)"),
        (6, (3,), r"wavelet taps must have shape \(2,\), got \(3,\)"),
    ],
)
def test_errors_before_kernels(place: int, shape: tuple[int, ...], message: str) -> None:
    x, *parameters = arguments(1, 2, 4, 5, channels=3)
    parameters[place] = torch.randn(shape)
    conv, spatial = Convolution(*parameters[:2]), SpatialParameters(*parameters[2:4])
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        fusion.local_branches(x, conv, spatial, WaveletParameters(*parameters[4:]))
