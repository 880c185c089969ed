"""Channel attention against the same formula with linear layers, image by image."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, SIZES, assert_close, assert_matches
from torch.utils._pytree import tree_map

from swformer_fast.parameters import AttentionParameters
from swformer_fast.reference import ChannelAttention, channel_attention


def arguments(size, dtype=torch.float64, batch=2, channels=6, hidden=3):
    shapes = ((batch, channels, *size), (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,))
    x, *parameters = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return x, AttentionParameters(*parameters)


@pytest.mark.parametrize("size", SIZES)
def test_equals_linear_layers(size):
    x, parameters = tree_map(torch.detach, arguments(size))
    w1, b1, w2, b2 = parameters
    expected = []
    for image in x:
        mean = torch.stack([plane.sum() / plane.numel() for plane in image])
        hidden = F.linear(mean, w1[:, :, 0, 0], b1).clamp(min=0)
        scale = 1 / (1 + torch.exp(-F.linear(hidden, w2[:, :, 0, 0], b2)))
        expected.append(torch.stack([plane * s for plane, s in zip(image, scale, strict=True)]))
    assert_close(channel_attention(x, parameters), torch.stack(expected))


@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
def test_gradients(size):
    x, parameters = arguments(size)
    with torch.no_grad():
        parameters.b1.add_(3 * parameters.b1.sign())  # away from the kink of ReLU

    def function(x, *parameters):
        return channel_attention(x, AttentionParameters(*parameters))

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype):
    x, parameters = arguments((9, 12), dtype=torch.float32, batch=3)
    x = LAYOUTS[layout](x.detach().to(dtype)).requires_grad_()
    assert_matches(channel_attention, channel_attention, (x, parameters), gradients=dtype == torch.float32)


@pytest.mark.parametrize(("dim", "reduction", "hidden"), [(120, 4, 30), (12, 6, 2), (9, 4, 2), (3, 4, 1)])
def test_module(dim, reduction, hidden):
    attention = ChannelAttention(dim, reduction)
    x = torch.randn(2, dim, 7, 6)
    assert {name: tuple(p.shape) for name, p in attention.state_dict().items()} == {
        "conv1.weight": (hidden, dim, 1, 1),
        "conv1.bias": (hidden,),
        "conv2.weight": (dim, hidden, 1, 1),
        "conv2.bias": (dim,),
    }
    assert_close(attention(x), x * attention.conv2(attention.conv1(x.mean((2, 3), keepdim=True)).relu()).sigmoid())
    assert attention(x[:0]).shape == (0, dim, 7, 6)


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 4, "reduction": 0}])
def test_constructor_errors(options):
    with pytest.raises(ValueError, match="at least 1"):
        ChannelAttention(**options)
