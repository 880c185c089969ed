"""The network: size and cost of the presets, shapes, padding, scales and options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, count_macs, poisoned_memory, randomise
from torch import nn

from swformer_fast.reference import PRESETS, HaarDWT2d, SWFormer, SWFormerBlock, haar_dwt2d, haar_idwt2d

SMALL = {"widths": (4, 8, 8), "depths": (1, 1, 1, 1, 1)}
COUNTS = {
    "derain-s": ("0.963", "20.06"),
    "derain-m": ("1.624", "27.45"),
    "derain-l": ("1.915", "40.15"),
    "lowlight-s": ("1.206", "7.11"),
    "lowlight-m": ("1.470", "9.55"),
    "lowlight-l": ("1.523", "11.76"),
    "defocus-s": ("3.036", "114.4"),
    "defocus-m": ("3.428", "147.2"),
    "defocus-l": ("3.555", "176.2"),
}
"""Millions of parameters and GMAC with all outputs: 256 x 256, defocus 480 x 720."""


def network(**options) -> SWFormer:
    return randomise(SWFormer(**{**SMALL, **options})).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_documented_size_and_cost(name):
    millions, gmac = COUNTS[name]
    size = (480, 720) if name.startswith("defocus") else (256, 256)
    with torch.device("meta"):
        model, image = SWFormer.from_preset(name).eval(), torch.empty(1, 3, *size)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == millions
    assert f"{count_macs(model, image, all_scales=True) / 1e9:.{len(gmac.split('.')[1])}f}" == gmac


def test_counted_operations():
    """The counting rule on a layer: multiply-accumulates and bias additions, functional convolutions left out."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 3, padding=1, groups=2)

        def forward(self, x):
            return F.conv2d(self.conv(x), torch.ones(4, 1, 2, 2), groups=4)

    assert count_macs(Layer(), torch.zeros(2, 6, 5, 7)) == 2 * 4 * 5 * 7 * (3 * 9 + 1)


def test_the_other_presets_are_ours():
    assert PRESETS.keys() - COUNTS.keys() == {"tiny"}
    assert 0.25e6 < sum(p.numel() for p in SWFormer.from_preset("tiny").parameters()) < 0.35e6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (16, 48), (17, 31), (50, 33)])
def test_shapes(size, training):
    model = network().train(training)
    image = torch.rand(2, 3, *size)
    assert model(image).shape == image.shape
    full, half, quarter = model(image, all_scales=True)
    assert full.shape == image.shape
    assert half.shape == (2, 12, -(-size[0] // 2), -(-size[1] // 2))
    assert quarter.shape == (2, 48, -(-size[0] // 4), -(-size[1] // 4))
    assert [t.shape for t in model.image_pyramid(image)] == [full.shape, half.shape, quarter.shape]


def test_padding_is_by_reflection_at_the_bottom_and_right():
    model, image = network(), torch.rand(1, 3, 21, 30)
    rows = [*range(21), *range(19, 8, -1)]
    cols = [*range(30), 28, 27]
    padded = image[:, :, rows][..., cols]
    assert padded.shape[2:] == (32, 32)
    full, half, quarter = model(padded, all_scales=True)
    actual = model(image, all_scales=True)
    assert_close(actual, (full[..., :21, :30], half[..., :11, :15], quarter[..., :6, :8]))
    assert torch.equal(model(image), actual[0])


def test_layer_by_layer():
    """The forward pass written out with the network's layers."""
    model, p0 = network(), torch.rand(2, 3, 32, 48)
    p1 = haar_dwt2d(p0)
    p2 = haar_dwt2d(p1)
    x1 = model.stages[0](model.embeddings[0](p0))
    x2 = model.stages[1](F.pixel_unshuffle(model.downs[0][0](x1), 2) + model.embeddings[1](p1))
    x3 = model.stages[2](F.pixel_unshuffle(model.downs[1][0](x2), 2) + model.embeddings[2](p2))
    up = F.pixel_shuffle(model.ups[0][0](x3), 2)
    x4 = model.stages[3](model.skips[0].conv(torch.cat((up, x2), dim=1)))
    up = F.pixel_shuffle(model.ups[1][0](x4), 2)
    x5 = model.stages[4](model.skips[1].conv(torch.cat((up, x1), dim=1)))
    expected = model.heads[0](x5) + p0, model.heads[1](x4) + p1, model.heads[2](x3) + p2
    assert_close(model(p0, all_scales=True), expected)


def test_the_pyramid_is_the_image():
    """Two fixed orthonormal transforms: invertible, without state."""
    model, image = network(), torch.rand(1, 3, 32, 32)
    full, half, quarter = model.image_pyramid(image)
    assert torch.equal(full, image)
    assert_close(haar_idwt2d(haar_idwt2d(quarter)), image)
    assert_close(haar_idwt2d(half), image)
    assert not [name for name in model.state_dict() if name.startswith("pyramid")]


@pytest.mark.parametrize(
    ("option", "extra"),
    [
        ({"pyramid": "learnable_haar"}, {f"pyramid.{i}.dec_{kind}" for i in (0, 1) for kind in ("lo", "hi")}),
        ({"pyramid": "pixel_unshuffle"}, set()),
        ({"fusion": "concat"}, {f"fusions.{i}.conv.{kind}" for i in (0, 1) for kind in ("weight", "bias")}),
        ({"skip": "add"}, {f"skips.{i}.conv.{kind}" for i in (0, 1) for kind in ("weight", "bias")}),
        ({"norm_position": "post"}, set()),
        ({"pool": "max"}, set()),
        ({"order": ("wavelet", "spatial", "fourier")}, set()),
        ({"in_channels": 1}, None),
        ({"split": (2, 1, 1), "ffn_ratio": 6, "spatial_kernel": 5}, None),
    ],
)
def test_options(option, extra):
    """Each option runs forward and backward on odd sizes and changes the network as documented."""
    model, default = network(**option), network()
    image = torch.rand(2, model.in_channels, 33, 18)
    outputs = model.train()(image, all_scales=True)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if extra is None:
        return
    assert model.state_dict().keys() ^ default.state_dict().keys() == extra
    if option.get("pyramid") != "learnable_haar":  # starts as the fixed one
        default.load_state_dict(model.state_dict(), strict=False)
        assert not torch.allclose(model.eval()(image), default(image), rtol=1e-3)


def test_every_parameter_learns():
    model = network().train()
    outputs = model(torch.rand(2, 3, 32, 32), all_scales=True)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_one_output_needs_one_head():
    model = network().train()
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert model.heads[0].weight.grad is not None
    assert model.heads[1].weight.grad is None


def test_evaluation_changes_nothing_and_is_repeatable():
    model, image = network(), torch.rand(2, 3, 33, 40)
    before = copy.deepcopy(model.state_dict())
    first = model(image)
    assert torch.equal(first, model(image))
    assert_close(model(image[:1]), first[:1])  # statistics are the running ones
    assert_close(model.state_dict(), before)


def test_training_updates_every_running_statistic():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    model(torch.rand(2, 3, 33, 40))
    running = [name for name in before if "running" in name]
    assert len(running) == 5 * 8
    assert not [name for name in running if torch.equal(before[name], model.state_dict()[name])]


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    model = network().train(training)
    outputs = model(torch.rand(0, 3, 33, 40), all_scales=True)
    assert [tuple(t.shape) for t in outputs] == [(0, 3, 33, 40), (0, 12, 17, 20), (0, 48, 9, 10)]
    torch.stack([output.sum() for output in outputs]).sum().backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_state_dict_round_trip():
    model, other, image = network(), SWFormer(**SMALL).eval(), torch.rand(1, 3, 32, 32)
    assert not torch.equal(model(image), other(image))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(image), other(image))
    assert torch.equal(copy.deepcopy(model)(image), other(image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = SWFormer(**SMALL, scale_init=0.1).eval()
    image = torch.rand(1, 3, 33, 40).to(dtype)
    expected = copy.deepcopy(model).double()(image.double())
    actual = model.to(dtype)(image)
    assert actual.dtype == dtype
    assert_close(actual, expected)


def test_autocast():
    model = network().train()
    image = torch.rand(2, 3, 33, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(image)
    output.float().sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layouts(layout):
    model, image = network(), torch.rand(2, 3, 33, 40)
    expected = copy.deepcopy(model).double()(image.double())
    window = torch.full((2, 3, 35, 44), float("nan"))[..., 1:34, 2:42].copy_(image)
    assert_close(model.to(memory_format=layout)(image.contiguous(memory_format=layout)), expected)
    assert_close(model(window), expected)


def test_no_value_comes_from_fresh_memory():
    model, image = network(), torch.rand(2, 3, 33, 40)
    expected = model(image)
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.equal(model(image), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_traces_without_a_graph_break():
    model, image = network(), torch.rand(1, 3, 32, 48)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), model(image))


def test_subclasses_choose_other_parts():
    class Block(SWFormerBlock):
        pass

    class DWT(HaarDWT2d):
        pass

    class Network(SWFormer):
        block_type = Block
        dwt_type = DWT

    model = Network.from_preset("tiny")
    assert type(model) is Network
    assert {type(m) for m in model.modules() if isinstance(m, SWFormerBlock)} == {Block}
    assert {type(m) for m in model.pyramid} == {DWT}
    assert model.state_dict().keys() == SWFormer.from_preset("tiny").state_dict().keys()


def test_a_preset_takes_the_constructors_options():
    model = SWFormer.from_preset("tiny", in_channels=1, depths=(1, 1, 1, 1, 1), skip="add")
    assert model.heads[0].out_channels == 1
    assert [len(stage) for stage in model.stages] == [1] * 5


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 15, 32), (1, 3, 32, 15)])
def test_images_it_cannot_take(shape):
    with pytest.raises(ValueError, match=r"image must have shape \(B, 3, H, W\)"):
        network()(torch.rand(shape))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"in_channels": 0}, ValueError, "in_channels"),
        ({"widths": (4, 8)}, ValueError, "widths"),
        ({"widths": (4, 6, 8)}, ValueError, "multiples of 4"),
        ({"depths": (1, 1, 1, 1)}, ValueError, "depths"),
        ({"depths": (1, 1, 0, 1, 1)}, ValueError, "depths"),
        ({"depths": (1, 1, 1.5, 1, 1)}, TypeError, "depths"),
        ({"pyramid": "laplacian"}, ValueError, "pyramid"),
        ({"fusion": "mean"}, ValueError, "fusion"),
        ({"skip": "none"}, ValueError, "skip"),
        ({"colour": "blue"}, TypeError, "colour"),
    ],
)
def test_constructor_errors(options, error, name):
    with pytest.raises(error, match=name):
        SWFormer(**{**SMALL, **options})


def test_unknown_preset():
    with pytest.raises(ValueError, match="'derain-s'"):
        SWFormer.from_preset("derain-xl")
