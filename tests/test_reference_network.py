"""The network: size and cost of the presets, shapes, padding, scales and options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, count_macs, poisoned_memory, randomise
from torch import nn

from swformer_fast.reference import (
    EXITS,
    PRESETS,
    HaarDWT2d,
    HaarIDWT2d,
    SWFormer,
    SWFormerBlock,
    haar_dwt2d,
    haar_idwt2d,
)

SMALL = {"widths": (4, 8, 8), "depths": (1, 1, 1, 1, 1)}
PUBLISHED = {
    "derain": ((0.95, 1.63, 1.91), (19.86, 27.65, 40.01)),
    "lowlight": ((1.22, 1.47, 1.54), (7.00, 9.41, 11.97)),
    "defocus": ((3.10, 3.49, 3.60), (114.2, 145.2, 177.6)),
}
"""Millions of parameters and GMAC of the three exits in the paper's tables."""
SIZES = {"defocus": (560, 840)}
"""256 x 256 for the other presets."""


def network(**options) -> SWFormer:
    return randomise(SWFormer(**{**SMALL, **options})).eval()


@pytest.mark.parametrize("exit", EXITS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size_and_cost(name, exit):
    """Each to 4 %; an exit counts what it is built of and what it runs."""
    millions, gmac = (table[EXITS.index(exit)] for table in PUBLISHED[name])
    with torch.device("meta"):
        model = SWFormer.from_preset(name).eval()
        image = torch.empty(1, 3, *SIZES.get(name, (256, 256)))
        built = SWFormer.from_preset(name, exit=exit)
    assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(millions, rel=0.04)
    assert count_macs(model, image, exit=exit) / 1e9 == pytest.approx(gmac, rel=0.04)


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
    assert PRESETS.keys() - PUBLISHED.keys() == {"tiny"}
    assert sum(p.numel() for p in SWFormer.from_preset("tiny").parameters()) < 0.4e6


def test_widths_are_those_of_the_figure():
    """C, 2C and 4C."""
    for (c, *others), _ in PRESETS.values():
        assert others == [2 * c, 4 * c]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (16, 48), (17, 31), (50, 33)])
def test_shapes(size, training):
    model = network().train(training)
    image = torch.rand(2, 3, *size)
    assert model(image).shape == image.shape
    assert [model(image, exit=exit).shape for exit in EXITS] == [image.shape] * 3
    quarter, half, full = model(image, all_scales=True)
    assert full.shape == image.shape
    assert half.shape == (2, 12, -(-size[0] // 2), -(-size[1] // 2))
    assert quarter.shape == (2, 48, -(-size[0] // 4), -(-size[1] // 4))
    assert [t.shape for t in model.image_pyramid(image)] == [quarter.shape, half.shape, full.shape]


def test_padding_is_by_reflection_at_the_bottom_and_right():
    model, image = network(), torch.rand(1, 3, 21, 30)
    rows = [*range(21), *range(19, 8, -1)]
    cols = [*range(30), 28, 27]
    padded = image[:, :, rows][..., cols]
    assert padded.shape[2:] == (32, 32)
    quarter, half, full = model(padded, all_scales=True)
    actual = model(image, all_scales=True)
    assert_close(actual, (quarter[..., :6, :8], half[..., :11, :15], full[..., :21, :30]))
    assert torch.equal(model(image), actual[2])
    for exit in EXITS:
        assert torch.equal(model(image, exit=exit), model(padded, exit=exit)[..., :21, :30])


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
    expected = model.heads[0](x3) + p2, model.heads[1](x4) + p1, model.heads[2](x5) + p0
    assert_close(model(p0, all_scales=True), expected)
    restored = haar_idwt2d(haar_idwt2d(expected[0])), haar_idwt2d(expected[1]), expected[2]
    assert_close(model(p0, exits=EXITS), restored)


def test_the_pyramid_is_the_image():
    """Two fixed orthonormal transforms: invertible, without state."""
    model, image = network(), torch.rand(1, 3, 32, 32)
    quarter, half, full = model.image_pyramid(image)
    assert torch.equal(full, image)
    assert_close(haar_idwt2d(haar_idwt2d(quarter)), image)
    assert_close(haar_idwt2d(half), image)
    assert not [name for name in model.state_dict() if name.startswith(("pyramid", "inverse"))]


@pytest.mark.parametrize(
    ("option", "extra"),
    [
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
    assert model.heads[2].weight.grad is not None
    assert model.heads[0].weight.grad is model.heads[1].weight.grad is None


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
    assert [tuple(t.shape) for t in outputs] == [(0, 48, 9, 10), (0, 12, 17, 20), (0, 3, 33, 40)]
    outputs += model(torch.rand(0, 3, 33, 40), exits=EXITS)
    assert [tuple(t.shape) for t in outputs[3:]] == [(0, 3, 33, 40)] * 3
    torch.stack([output.sum() for output in outputs]).sum().backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_state_dict_round_trip():
    model, other, image = network(), SWFormer(**SMALL).eval(), torch.rand(1, 3, 32, 32)
    assert not torch.equal(model(image), other(image))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(image), other(image))
    assert torch.equal(copy.deepcopy(model)(image), other(image))


@pytest.mark.parametrize("exit", EXITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, exit):
    model = SWFormer(**SMALL, scale_init=0.1).eval()
    image = torch.rand(1, 3, 33, 40).to(dtype)
    expected = copy.deepcopy(model).double()(image.double(), exit)
    actual = model.to(dtype)(image, exit)
    assert actual.dtype == dtype
    assert_close(actual, expected)


@pytest.mark.parametrize("exit", EXITS)
def test_autocast(exit):
    model = network().train()
    image = torch.rand(2, 3, 33, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(image, exit)
    output.float().sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("exit", EXITS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layouts(layout, exit):
    model, image = network(), torch.rand(2, 3, 33, 40)
    expected = copy.deepcopy(model).double()(image.double(), exit)
    window = torch.full((2, 3, 35, 44), float("nan"))[..., 1:34, 2:42].copy_(image)
    assert_close(model.to(memory_format=layout)(image.contiguous(memory_format=layout), exit), expected)
    assert_close(model(window, exit), expected)


def test_no_value_comes_from_fresh_memory():
    model, image = network(), torch.rand(2, 3, 33, 40)
    expected = model(image, exits=EXITS)
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert all(map(torch.equal, model(image, exits=EXITS), expected))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("options", [{}, *({"exit": exit} for exit in EXITS), {"exits": EXITS}, {"all_scales": True}])
def test_traces_without_a_graph_break(options):
    model, image = network(), torch.rand(1, 3, 32, 48)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(image, **options), model(image, **options))


# exits ----------------------------------------------------------------------------------------------------------------


def test_the_last_exit_is_the_default():
    model, image = network(), torch.rand(1, 3, 17, 30)
    assert torch.equal(model(image), model(image, exit="large"))
    model = network(exit="medium")
    assert torch.equal(model(image), model(image, exit="medium"))


@pytest.mark.parametrize("exits", [EXITS, ["large", "small"], ("medium",), ("small", "small")])
def test_several_exits_in_one_pass(exits):
    model, image = network(), torch.rand(2, 3, 33, 50)
    calls = []
    model.stages[0].register_forward_hook(lambda *_: calls.append(1))
    outputs = model(image, exits=exits)
    assert isinstance(outputs, tuple)
    assert len(calls) == 1
    assert all(map(torch.equal, outputs, [model(image, exit=exit) for exit in exits]))


@pytest.mark.parametrize(
    ("options", "last", "heads"),
    [({"exit": exit}, i, {i}) for i, exit in enumerate(EXITS)]
    + [({"exits": ("medium", "small")}, 1, {0, 1}), ({"all_scales": True}, 2, {0, 1, 2})],
)
def test_nothing_runs_after_the_exit(options, last, heads):
    model, ran = network(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(torch.rand(1, 3, 32, 32), **options)
    present = {i for i in range(5) if f"stages.{i}" in ran}
    assert present == set(range(3 + last))
    for part in ("ups", "skips"):
        assert {i for i in range(2) if f"{part}.{i}" in ran} == set(range(last))
    assert {i for i in range(3) if f"heads.{i}" in ran} == heads


@pytest.mark.parametrize("last", EXITS)
def test_a_smaller_network_is_a_part_of_the_larger_one(last):
    """Built alone it has nothing after its exit, the names of the whole, and its very output."""
    large, small, image = network(), SWFormer(**SMALL, exit=last).eval(), torch.rand(2, 3, 17, 30)
    place = EXITS.index(last)
    assert [len(part) for part in (small.stages, small.ups, small.skips, small.heads)] == [
        3 + place, place, place, 1 + place
    ]  # fmt: skip
    state = large.state_dict()
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    for exit in EXITS[: place + 1]:
        assert torch.equal(small(image, exit=exit), large(image, exit=exit))
    assert all(map(torch.equal, small(image, all_scales=True), large(image, all_scales=True)))
    assert len(small.image_pyramid(image)) == len(small(image, all_scales=True)) == 1 + place
    outputs = small.train()(image, all_scales=True)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("pyramid", ["haar", "pixel_unshuffle"])
@pytest.mark.parametrize("size", [(32, 48), (17, 30)])
def test_every_exit_is_lossless(pyramid, size):
    """Where nothing is added, the image comes back, to rounding."""
    model, image = network(pyramid=pyramid), torch.rand(2, 3, *size)
    for head in model.heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    for output in model(image, exits=EXITS):
        torch.testing.assert_close(output, image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exit", EXITS)
def test_an_exit_learns_what_it_runs(exit):
    model = network().train()
    model(torch.rand(2, 3, 33, 18), exit=exit).square().mean().backward()
    part = SWFormer(**SMALL, exit=exit)
    other = {f"heads.{i}" for i, name in enumerate(EXITS) if name != exit}
    used = {name for name, _ in part.named_parameters() if name.rpartition(".")[0] not in other}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == used


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"exit": "tiny"}, ValueError, "exit must be one of 'small', 'medium', 'large'"),
        ({"exit": 1}, ValueError, "exit must be one of"),
        ({"exits": ("small", "huge")}, ValueError, "exits must be one of"),
        ({"exits": "small"}, ValueError, "exits must be a list or tuple"),
        ({"exits": ()}, ValueError, "exits must be a list or tuple"),
        ({"exit": "large"}, ValueError, "exit must be built, got 'large': this network ends at exit 'medium'"),
        ({"exits": ("small", "large")}, ValueError, "exits must be built, got 'large'"),
        ({"exit": "small", "all_scales": True}, ValueError, "exclude each other"),
        ({"exit": "small", "exits": ("small",)}, ValueError, "exclude each other"),
        ({"exits": ("small",), "all_scales": True}, ValueError, "exclude each other"),
        ({"all_scales": "yes"}, TypeError, "all_scales"),
    ],
)
def test_exits_it_cannot_take(options, error, words):
    with pytest.raises(error, match=words):
        network(exit="medium")(torch.rand(1, 3, 16, 16), **options)


# construction ---------------------------------------------------------------------------------------------------------


def test_subclasses_choose_other_parts():
    class Block(SWFormerBlock):
        pass

    class DWT(HaarDWT2d):
        pass

    class IDWT(HaarIDWT2d):
        pass

    class Network(SWFormer):
        block_type = Block
        dwt_type = DWT
        idwt_type = IDWT

    model = Network.from_preset("tiny")
    assert type(model) is Network
    assert {type(m) for m in model.modules() if isinstance(m, SWFormerBlock)} == {Block}
    assert {type(m) for m in model.pyramid} == {DWT}
    assert type(model.inverse) is IDWT
    assert model.state_dict().keys() == SWFormer.from_preset("tiny").state_dict().keys()


def test_a_preset_takes_the_constructors_options():
    model = SWFormer.from_preset("tiny", exit="medium", in_channels=1, depths=(1, 1, 1, 1, 1), skip="add")
    assert [head.out_channels for head in model.heads] == [16, 4]
    assert [len(stage) for stage in model.stages] == [1] * 4


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
        ({"exit": "tiny"}, ValueError, "exit"),
        ({"fusion": "mean"}, ValueError, "fusion"),
        ({"skip": "none"}, ValueError, "skip"),
        ({"colour": "blue"}, TypeError, "colour"),
    ],
)
def test_constructor_errors(options, error, name):
    with pytest.raises(error, match=name):
        SWFormer(**{**SMALL, **options})


def test_unknown_preset():
    with pytest.raises(ValueError, match="'derain'"):
        SWFormer.from_preset("derain-s")
