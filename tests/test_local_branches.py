"""local_branches: strips, and the mixer's use of it. What every op keeps is in test_contract.py."""

import pytest
import torch
from contract import needs_cpp
from helpers import TOLERANCE, assert_close, fp64, poisoned_memory, rel_rms
from torch import Tensor

import swformer_fast as sf
from swformer_fast import fusion
from swformer_fast.parameters import SpatialParameters, WaveletParameters

pytestmark = needs_cpp
local_branches = torch.ops.swformer_fast.local_branches
definition = sf.backend.OPS["local_branches"].reference


def arguments(
    *shape: int, channels: int = 0, kernels: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """An image and the parameters: of the convolution, the spatial branch and the wavelet branch."""
    dim, parameter_dtype = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
    channels = channels or dim
    sizes = ((2 * channels, dim), (2 * channels,), (channels, 1, *2 * kernels[:1]), (channels,))
    sizes = (*sizes, (4 * channels, 1, *2 * kernels[1:]), (4 * channels,), *4 * ((2,),))
    # Means that are not 0: the sums must hold more than rounding errors.
    return [
        torch.randn(shape, dtype=parameter_dtype).add(0.5).to(dtype),
        *(torch.randn(s, dtype=parameter_dtype) + 0.2 for s in sizes),
    ]


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


@pytest.mark.parametrize("shape", [(1, 3, 300, 11), (1, 40, 70, 256), (3, 2, 65, 1100), (1, 8, 200, 37)])
def test_strips_and_tasks(shape: tuple[int, ...]) -> None:
    """Images of many strips, the last of them short, and of several tasks."""
    check(arguments(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixer_with_and_without_gradients(dtype: torch.dtype) -> None:
    mixer = sf.MultiDomainMixer(6).to(dtype).eval()
    x = torch.randn(2, 6, 33, 48, dtype=dtype)
    calls: list[str] = []

    def names(record: bool) -> list[str]:
        with torch.set_grad_enabled(record), torch.profiler.profile() as profile:
            results.append(mixer(x).detach())
        calls.extend(event.key for event in profile.key_averages() if "local_branches" in event.key)
        return calls

    results: list[Tensor] = []
    assert not names(True)
    assert names(False)
    assert rel_rms(*results) < (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (5, 2), r"in_weight must have shape \(6, 2\), got \(5, 2\)"),
        (1, (5,), r"in_bias must have shape \(6,\), got \(5,\)"),
        (3, (4,), r"spatial.bias must have shape \(3,\), got \(4,\)"),
        (4, (3, 1, 3, 3), r"wavelet.weight must have shape \(12, 1, 3, 3\), got \(3, 1, 3, 3\)"),
        (6, (3,), r"wavelet.dec_lo must have shape \(2,\), got \(3,\)"),
    ],
)
def test_errors_before_kernels(place: int, shape: tuple[int, ...], message: str) -> None:
    x, *parameters = arguments(1, 2, 4, 5, channels=3)
    parameters[place] = torch.randn(shape)
    spatial, wavelet = SpatialParameters(*parameters[2:4]), WaveletParameters(*parameters[4:])
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        fusion.local_branches(x, *parameters[:2], spatial, wavelet)
