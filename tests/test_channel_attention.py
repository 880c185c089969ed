"""Channel attention: units that are off, and errors of its own. What every op keeps is in test_contract.py."""

from collections.abc import Callable

import pytest
import torch
from contract import arguments, check, public, refusal
from helpers import with_field
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional
from swformer_fast.parameters import AttentionParameters


def cpp(args: list) -> None:
    if not refusal("channel_attention", "cpp", args):
        with sf.use_backend("cpp"):
            check("channel_attention", args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_several_ranges_of_pixels(dtype: torch.dtype) -> None:
    cpp(arguments("channel_attention", 2, 12, 130, 97, dtype=dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_units_that_are_off(layout: str) -> None:
    x, w1, b1, w2, b2 = arguments("channel_attention", 2, 6, 8, 9, layout=layout)
    with torch.no_grad():
        b1[:2] = -100
        w1[2], b1[2] = 0, 0
    cpp([x, w1, b1, w2, b2])
    check("channel_attention", [x, w1, b1, w2, b2])


def test_channels_last_falls_back() -> None:
    args = public("channel_attention", arguments("channel_attention", 2, 5, 9, 7, layout="channels_last"))
    assert "channels_last" in sf.why_not(functional.channel_attention, *args)


def replaced(name: str, value: object) -> tuple[Tensor, AttentionParameters]:
    x, parameters = public("channel_attention", arguments("channel_attention", 1, 4, 6, 6))
    return x, with_field(parameters, name, value)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "parameters must be a .*AttentionParameters", lambda: (torch.ones(1, 4, 6, 6), (1, 2, 3, 4))),
        (TypeError, "w1 must be a torch.Tensor, got NoneType", lambda: replaced("w1", None)),
        (ValueError, r"w1 must have shape \(R, 4, 1, 1\), got \(4,\)", lambda: replaced("w1", torch.ones(4))),
        (ValueError, "w1 must have shape", lambda: replaced("w1", torch.ones(4, 3, 1, 1))),
        (ValueError, "b1 must have shape", lambda: replaced("b1", torch.ones(3))),
        (ValueError, "w2 must have shape", lambda: replaced("w2", torch.ones(4, 3, 1, 1))),
        (TypeError, "b2 must have the dtype", lambda: replaced("b2", torch.ones(4, dtype=torch.float64))),
    ],
)
def test_errors(error: type[Exception], message: str, args: Callable[[], tuple]) -> None:
    with pytest.raises(error, match=message):
        functional.channel_attention(*args())
