"""Sums over the pixels, an op's second result: their precision, and what they spare a block. What every op keeps is in
test_contract.py."""

from typing import Any

import pytest
import torch
from contract import CATALOGUE, arguments, as_list, check, detached, needs_cpp, op_of
from helpers import fp64, rel_rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swformer_fast as sf

NAMES = [name for name, operator in CATALOGUE.items() if operator.sums]
pytestmark = needs_cpp


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NAMES)
def test_ranges_of_rows_add_up(name: str, layout: str) -> None:
    with sf.use_backend("cpp"):
        check(name, arguments(name, 1, 2, 402, 21, layout=layout))


@pytest.mark.parametrize("name", NAMES)
def test_long_sums_keep_their_precision(name: str) -> None:
    """A million terms of one sign: a single running sum in fp32 would be off by 1e-4."""
    args = detached(arguments(name, 1, 1, 1024, 1024))
    args = [torch.rand_like(args[0]) + 3, *(t.abs() if isinstance(t, Tensor) else t for t in args[1:])]
    with sf.use_backend("cpp"):
        sums = as_list(op_of(name)(*args))[1]
    assert rel_rms(sums, as_list(CATALOGUE[name].forward(*fp64(args)))[1]) < 5e-7


@pytest.mark.parametrize("training", [False, True])
def test_a_block_reads_no_map_for_its_mean(training: bool) -> None:
    """Neither forward nor backward has an operator of its own for the sums of channel attention and their gradient."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.on_maps: set[str] = set()

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if any(isinstance(t, Tensor) and t.numel() == x.numel() for t in tree_leaves((args, result))):
                self.on_maps.add(str(op))
            return result

    block = sf.SWFormerBlock(8).train(training)
    x = torch.randn(2, 8, 32, 34, requires_grad=training)
    with Recorder() as recorder:
        y = block(x)
        if training:
            y.backward(torch.ones_like(y))
    names = {op for op in recorder.on_maps if "sum" in op or "mean" in op or "expand" in op}
    assert not names
    assert any("depthwise_gelu" in op for op in recorder.on_maps)
