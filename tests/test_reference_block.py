"""The mixer and the block: what they are made of, and every option."""

import pytest
import torch
from helpers import assert_close, assert_matches, fp64, randomise

from swformer_fast.reference import (
    ChannelAttention,
    FourierBranch,
    MultiDomainMixer,
    MultiScaleFFN,
    SpatialBranch,
    SWFormerBlock,
    WaveletBranch,
)

MIXER_OPTIONS = [
    {},
    {"split": (2, 1, 0.5)},
    {"order": ("fourier", "spatial", "wavelet")},
    {"spatial_kernel": 5},
    {"wavelet_kernel": 1},
    {"layout": "concatenated"},
    {"reduction": 2},
]
BLOCK_OPTIONS = [
    {"norm_position": "post"},
    {"ffn_ratio": 1.5},
    {"ffn_kernel": 5},
    {"pool": "max"},
    {"upsample": "nearest"},
    {"split": (1, 0.5, 1.5), "reduction": 8},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", MIXER_OPTIONS)
def test_mixer_equals_its_parts(options, training):
    """The same split and concatenation by channel offsets."""
    dim, order, split = 4, options.get("order", ("spatial", "wavelet", "fourier")), options.get("split", (1, 1, 1))
    mixer = randomise(MultiDomainMixer(dim, **options)).train(training)
    x = torch.randn(2, dim, 7, 10)
    y, outputs, start = mixer.conv_in(x), [], 0
    for name in order:
        width = int(dim * split[("spatial", "wavelet", "fourier").index(name)])
        outputs.append(getattr(mixer, name)(y[:, start : start + width]))
        start += width
    assert start == y.shape[1]
    assert_close(mixer(x), mixer.conv_out(mixer.attention(torch.cat(outputs, dim=1))))


@pytest.mark.parametrize("options", MIXER_OPTIONS[1:])
def test_mixer_options_change_the_result(options):
    """With the same parameters where the shapes allow it, else by the shapes."""
    default, other = MultiDomainMixer(4).eval(), MultiDomainMixer(4, **options).eval()
    shapes = [{name: t.shape for name, t in mixer.state_dict().items()} for mixer in (default, other)]
    if shapes[0] == shapes[1]:
        other.load_state_dict(randomise(default).state_dict())
        x = torch.randn(1, 4, 6, 6)
        assert not torch.allclose(default(x), other(x), rtol=1e-3)
    assert other.canonical == (not options.keys() & {"split", "order", "layout"})


def test_mixer_has_the_documented_parts():
    mixer = MultiDomainMixer(40)
    kinds = {
        "spatial": SpatialBranch,
        "wavelet": WaveletBranch,
        "fourier": FourierBranch,
        "attention": ChannelAttention,
    }
    for name, kind in kinds.items():
        assert type(getattr(mixer, name)) is kind
    assert mixer.attention.conv1.weight.shape == (30, 120, 1, 1)
    assert mixer.canonical


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, *BLOCK_OPTIONS])
def test_block_equals_its_parts(options, training):
    block = randomise(SWFormerBlock(4, **options)).train(training)
    x = torch.randn(2, 4, 7, 10)
    if options.get("norm_position") == "post":
        y = x + block.beta * block.norm1(block.mixer(x))
        expected = y + block.gamma * block.norm2(block.ffn(y))
    else:
        y = x + block.beta * block.mixer(block.norm1(x))
        expected = y + block.gamma * block.ffn(block.norm2(y))
    assert_close(block(x), expected)
    assert block.canonical == (not options.keys() & {"norm_position", "pool", "upsample", "split"})


@pytest.mark.parametrize("training", [True, False])
def test_block_in_fp32_against_fp64(training):
    """Outputs, input gradient and parameter gradients of one block."""
    block = randomise(SWFormerBlock(8)).train(training)
    double = SWFormerBlock(8).double().train(training)
    double.load_state_dict(block.state_dict())
    names = [name for name, _ in block.named_parameters()]

    def run(module):
        def function(x, *parameters):
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

        return function

    x = torch.randn(2, 8, 12, 9, requires_grad=True)
    assert_matches(run(block), run(double), (x, *block.parameters()))


def test_block_is_the_identity_at_the_start():
    block = SWFormerBlock(4)
    x = torch.randn(2, 4, 7, 10)
    assert torch.equal(block(x), x)
    assert not torch.equal(SWFormerBlock(4, scale_init=0.1)(x), x)
    assert SWFormerBlock(4, scale_init=0.1).beta.unique().tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("training", [True, False])
def test_block_gradients(training):
    """fp64 gradcheck with respect to the input and every parameter."""
    block = randomise(SWFormerBlock(2, ffn_ratio=1.5)).double().train(training)
    names = [name for name, _ in block.named_parameters()]
    parameters = fp64(tuple(block.parameters()))

    def function(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def test_state_dict_names():
    """The names are part of the interface: checkpoints depend on them."""
    prefixes = {name.rsplit(".", 1)[0] for name in SWFormerBlock(4).state_dict()}
    assert prefixes == {
        "beta",
        "gamma",
        "norm1",
        "norm2",
        *(f"mixer.{part}" for part in ("conv_in", "conv_out", "spatial.conv", "wavelet", "wavelet.conv")),
        *(
            f"mixer.fourier.{part}"
            for part in ("conv_in", "gate_bn", "gate_conv", "value_bn", "value_conv", "conv_out")
        ),
        *(f"mixer.attention.{part}" for part in ("conv1", "conv2")),
        *(f"ffn.{part}" for part in ("conv_in", "dw.0", "dw.1", "dw.2", "conv_out")),
    }


def test_subclasses_choose_other_parts():
    class Spatial(SpatialBranch):
        pass

    class Mixer(MultiDomainMixer):
        spatial_type = Spatial

    class FFN(MultiScaleFFN):
        pass

    class Block(SWFormerBlock):
        mixer_type = Mixer
        ffn_type = FFN

    block = Block(4)
    assert type(block.mixer.spatial) is Spatial
    assert type(block.ffn) is FFN
    assert block.state_dict().keys() == SWFormerBlock(4).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"dim": 0}, ValueError, "dim"),
        ({"dim": 4, "norm_position": "none"}, ValueError, "norm_position"),
        ({"dim": 4, "split": (1, 1)}, ValueError, "split"),
        ({"dim": 4, "split": (1, 1, 0.3)}, ValueError, "split"),
        ({"dim": 4, "split": (1, 1, 0)}, ValueError, "split"),
        ({"dim": 4, "order": ("spatial", "spatial", "fourier")}, ValueError, "order"),
        ({"dim": 4, "reduction": 0}, ValueError, "reduction"),
        ({"dim": 4, "colour": "blue"}, TypeError, "colour"),
    ],
)
def test_constructor_errors(options, error, name):
    with pytest.raises(error, match=name):
        SWFormerBlock(**options)
