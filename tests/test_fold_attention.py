"""fold_attention: what it stands for. What every op keeps is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import arguments
from helpers import assert_close
from torch import Tensor

import swformer_fast as sf
from swformer_fast import reference


@pytest.mark.parametrize("scaled", [True, False])
def test_fold_attention_is_what_it_folds(scaled: bool) -> None:
    """For each image one convolution of the three maps in place of the layers."""
    args = arguments("fold_attention", 2, 3, 4, 5, dtype=torch.float64, optional=scaled)
    *_, w1, b1, w2, b2, last_weight, last_bias, weight, bias, scale, area = [
        a.detach() if isinstance(a, Tensor) else a for a in args
    ]
    maps = [torch.randn(2, c, 4, 5, dtype=torch.float64) for c in (3, 4, 6)]
    y = torch.cat((*maps[:2], F.conv2d(maps[2], last_weight[..., None, None], last_bias)), 1)
    attention = reference.channel_attention(
        y, sf.parameters.AttentionParameters(w1[..., None, None], b1, w2[..., None, None], b2)
    )
    y = F.conv2d(attention, weight[..., None, None], bias)
    y = y if scale is None else scale[:, None, None] * y
    sums = [m.sum((2, 3)) for m in maps]
    folded = torch.ops.swformer_fast.fold_attention(
        *sums, w1, b1, w2, b2, last_weight, last_bias, weight, bias, scale, area
    )
    outputs, width = len(bias), sum(m.shape[1] for m in maps)
    weights, biases = folded.split((2 * outputs * width, 2 * outputs))
    actual = torch.einsum("bei,bihw->behw", weights.view(2, outputs, width), torch.cat(maps, 1))
    assert_close(actual + biases.view(2, outputs, 1, 1), y, torch.float64)
