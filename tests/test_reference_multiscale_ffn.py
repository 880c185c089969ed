"""The multi-scale FFN against pooling and interpolation matrices built sample by sample."""

import math

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, assert_matches

from swformer_fast.parameters import Convolution, FfnParameters, flatten, unflatten
from swformer_fast.reference import MultiScaleFFN, multiscale_ffn


def arguments(size, kernel=3, dtype=torch.float64, batch=2, dim=3, width=2):
    def parameter(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    return parameter(batch, dim, *size), FfnParameters(
        parameter(3 * width, dim, 1, 1),
        parameter(3 * width),
        tuple(Convolution(parameter(width, 1, kernel, kernel), parameter(width)) for _ in range(3)),
        parameter(dim, 3 * width, 1, 1),
        parameter(dim),
    )


def windows(length, scale):
    """The samples of each window; the last holds what is left."""
    return [list(range(start, min(start + scale, length))) for start in range(0, length, scale)]


def pooled(x, scale, kind):
    rows = [x[:, :, window] for window in windows(x.shape[2], scale)]
    blocks = [[row[..., window] for window in windows(x.shape[3], scale)] for row in rows]
    reduce = (lambda b: b.mean((2, 3))) if kind == "avg" else (lambda b: b.amax((2, 3)))
    return torch.stack([torch.stack([reduce(block) for block in row], dim=-1) for row in blocks], dim=-2)


def interpolation(source, target, kind):
    """(target, source) matrix, sample centres aligned as with align_corners=False."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        if kind == "nearest":
            matrix[i, i * source // target] = 1
            continue
        position = max(0.0, (i + 0.5) * source / target - 0.5)
        low = math.floor(position)
        matrix[i, low] += 1 - (position - low)
        matrix[i, min(low + 1, source - 1)] += position - low
    return matrix


def naive(x, parameters, pool="avg", upsample="bilinear"):
    in_weight, in_bias, depthwise, out_weight, out_bias = parameters
    height, width = x.shape[2:]
    hidden = torch.einsum("oi,bihw->bohw", in_weight[:, :, 0, 0], x) + in_bias.reshape(-1, 1, 1)
    channels = hidden.shape[1] // 3
    outputs = []
    for index, scale in enumerate((1, 2, 4)):
        z = pooled(hidden[:, index * channels : (index + 1) * channels], scale, pool)
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels, dtype=x.dtype)
        layer.load_state_dict(depthwise[index]._asdict())
        z = layer(z)
        to_rows = interpolation(z.shape[2], height, upsample)
        to_cols = interpolation(z.shape[3], width, upsample)
        outputs.append(torch.einsum("hi,bcij,wj->bchw", to_rows, z, to_cols))
    y = torch.cat(outputs, dim=1)
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return torch.einsum("oi,bihw->bohw", out_weight[:, :, 0, 0], y) + out_bias.reshape(-1, 1, 1)


@pytest.mark.parametrize(("pool", "upsample"), [("avg", "bilinear"), ("max", "bilinear"), ("avg", "nearest")])
@pytest.mark.parametrize("size", [*SIZES, (7, 10), (64, 64)])
def test_equals_naive(size, pool, upsample):
    args, options = arguments(size), {"pool": pool, "upsample": upsample}
    with torch.no_grad():
        assert_close(multiscale_ffn(*args, **options), naive(*args, **options))


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_gradients(size):
    x, parameters = arguments(size, batch=1, dim=2, width=1)

    def function(x, *tensors):
        return multiscale_ffn(x, unflatten(FfnParameters, tensors))

    args = (x, *flatten(parameters))
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype):
    x, parameters = arguments((9, 12), dtype=torch.float32, batch=3)
    x = LAYOUTS[layout](x.detach().to(dtype)).requires_grad_()
    assert_matches(multiscale_ffn, multiscale_ffn, (x, parameters), gradients=dtype == torch.float32)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({}, 12),
        ({"ratio": 1.5}, 6),
        ({"ratio": 6, "kernel_size": 5}, 24),
        ({"pool": "max"}, 12),
        ({"upsample": "nearest"}, 12),
    ],
)
def test_module(options, hidden):
    ffn = MultiScaleFFN(4, **options)
    x, k = torch.randn(2, 4, 7, 6), options.get("kernel_size", 3)
    assert {name: tuple(p.shape) for name, p in ffn.state_dict().items()} == {
        "conv_in.weight": (hidden, 4, 1, 1),
        "conv_in.bias": (hidden,),
        **{f"dw.{i}.weight": (hidden // 3, 1, k, k) for i in range(3)},
        **{f"dw.{i}.bias": (hidden // 3,) for i in range(3)},
        "conv_out.weight": (4, hidden, 1, 1),
        "conv_out.bias": (4,),
    }
    assert ffn.canonical == (options.keys() <= {"ratio", "kernel_size"})
    keywords = {name: options[name] for name in ("pool", "upsample") if name in options}
    assert torch.equal(ffn(x), multiscale_ffn(x, *ffn.arguments(), **keywords))
    assert ffn(x[:0]).shape == (0, 4, 7, 6)
    if keywords:
        assert not torch.allclose(ffn(x), multiscale_ffn(x, *ffn.arguments()))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": 4, "ratio": 2}, "ratio"),
        ({"dim": 4, "ratio": 0}, "ratio"),
        ({"dim": 4, "kernel_size": 2}, "kernel_size"),
        ({"dim": 4, "pool": "min"}, "pool"),
        ({"dim": 4, "upsample": "cubic"}, "upsample"),
    ],
)
def test_constructor_errors(options, name):
    with pytest.raises(ValueError, match=name):
        MultiScaleFFN(**options)
