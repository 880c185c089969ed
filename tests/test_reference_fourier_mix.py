"""The Fourier branch against DFT matrices and nn.BatchNorm2d."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_close, assert_matches
from torch import nn

from swformer_fast.parameters import Factor, FourierParameters, Norm, flatten, unflatten
from swformer_fast.reference import FourierBranch, fourier_mix

SIZES = [(1, 2), (2, 1), (2, 2), (3, 5), (8, 6), (7, 12), (63, 64), (65, 33)]


class Naive(nn.Module):
    """The definition with DFT matrices, a list of channels and PyTorch's own layers; the same state_dict keys."""

    def __init__(self, dim, layout="interleaved", **options):
        super().__init__()
        self.layout = layout
        self.conv_in = nn.Conv2d(dim, 2 * dim, 1)
        self.gate_bn = nn.BatchNorm2d(2 * dim, **options)
        self.gate_conv = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.value_bn = nn.BatchNorm2d(2 * dim, **options)
        self.value_conv = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.conv_out = nn.Conv2d(dim, dim, 1)

    def channels(self, dim):
        """Where the real and the imaginary part of each complex channel are."""
        pairs = [(2 * c, 2 * c + 1) if self.layout == "interleaved" else (c, dim + c) for c in range(dim)]
        return [real for real, _ in pairs], [imag for _, imag in pairs]

    def spectrum(self, x):
        height, width = x.shape[2:]
        rows = dft(height)
        cols = dft(width)[:, : width // 2 + 1]
        z = torch.einsum("ki,bcij,jl->bckl", rows, x.to(torch.complex128), cols) / math.sqrt(height * width)
        real, imag = self.channels(x.shape[1])
        out = torch.empty(x.shape[0], 2 * x.shape[1], *z.shape[2:], dtype=x.dtype)
        out[:, real], out[:, imag] = z.real, z.imag
        return out

    def inverse(self, y, size):
        """Half spectrum to image: columns other than the first and Nyquist stand for their mirror images too."""
        height, width = size
        real, imag = self.channels(y.shape[1] // 2)
        z = torch.complex(y[:, real], y[:, imag])
        share = torch.full((z.shape[-1],), 2.0, dtype=torch.float64)
        share[0] = 1
        if width % 2 == 0:
            share[-1] = 1
        cols = dft(width)[: z.shape[-1]].conj()
        image = torch.einsum("ik,bckl,l,lj->bcij", dft(height).conj(), z, share.to(z.dtype), cols)
        return image.real / math.sqrt(height * width)

    def forward(self, x):
        mixed = self.conv_in(x)
        gate, value = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
        gate = torch.sigmoid(self.gate_conv(self.gate_bn(self.spectrum(gate))))
        value = F.gelu(self.value_conv(self.value_bn(self.spectrum(value))))
        return self.conv_out(self.inverse(gate * value, x.shape[2:]))


def dft(n):
    k = torch.arange(n, dtype=torch.float64)
    return torch.polar(torch.ones(n, n, dtype=torch.float64), -2 * math.pi * torch.outer(k, k) / n)


def pair(dim, layout="interleaved", **options):
    """A branch in fp64 with random parameters and running statistics, and the naive form with the same state."""
    branch, naive = (cls(dim, layout=layout, **options).double() for cls in (FourierBranch, Naive))
    with torch.no_grad():
        for name, tensor in branch.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2) if name.endswith("running_var") else tensor.normal_()
    naive.load_state_dict(branch.state_dict())
    return branch, naive


def arguments(size, dtype=torch.float64, batch=2, dim=2):
    def parameter(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    def norm():
        mean, variance = torch.randn(2 * dim, dtype=dtype), torch.rand(2 * dim, dtype=dtype) + 0.5
        return Norm(mean, variance, parameter(2 * dim), parameter(2 * dim))

    def conv(out, inner):
        weight = torch.randn(out, inner, 1, 1, dtype=dtype) / math.sqrt(inner)
        return weight.requires_grad_(), parameter(out)

    return parameter(batch, dim, *size), FourierParameters(
        *conv(2 * dim, dim),
        Factor(norm(), *conv(2 * dim, 2 * dim)),
        Factor(norm(), *conv(2 * dim, 2 * dim)),
        *conv(dim, dim),
    )


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_equals_naive(size, training, layout):
    branch, naive = pair(3, layout)
    branch.train(training)
    naive.train(training)
    x = torch.randn(2, 3, *size, dtype=torch.float64) + 0.5
    assert_close(branch(x), naive(x))
    assert_close(branch.state_dict(), naive.state_dict())


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_batch_normalisation_through_training_and_evaluation(momentum, track):
    branch, naive = pair(2, momentum=momentum, track_running_stats=track, eps=1e-3)
    for step, training in enumerate((True, True, False, True, False)):
        branch.train(training)
        naive.train(training)
        x = torch.randn(2, 2, 5, 6, dtype=torch.float64) + step
        assert_close(branch(x), naive(x))
        state, expected = branch.state_dict(), naive.state_dict()
        assert state.keys() == expected.keys()
        assert_close(state, expected)
        assert state.get("gate_bn.num_batches_tracked") == expected.get("gate_bn.num_batches_tracked")


def test_frozen_normalisation_in_a_training_branch():
    """The usual idiom of fine-tuning: only the normalisations are set to evaluation."""
    branch, naive = pair(2)
    for module in itertools.chain(branch.modules(), naive.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = branch.gate_bn.running_mean.clone()
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    assert_close(branch(x), naive(x))
    assert torch.equal(branch.gate_bn.running_mean, before)


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(2, 3), (3, 2), (1, 4)])
def test_gradients(size, training, layout):
    x, parameters = arguments(size, dim=1)
    leaves = [leaf for leaf in flatten(parameters) if leaf.requires_grad]

    def function(x, *inputs):
        following = iter(inputs)
        tensors = [next(following) if t.requires_grad else t for t in flatten(parameters)]
        return fourier_mix(x, unflatten(FourierParameters, tensors), training=training, layout=layout)

    assert torch.autograd.gradcheck(function, (x, *leaves))
    assert torch.autograd.gradgradcheck(function, (x, *leaves))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_memory_layouts(layout, dtype, training):
    x, parameters = arguments((9, 12), dtype=torch.float32, batch=3, dim=4)
    # The first bias reaches the DC bin alone, times sqrt(H W): a large one saturates the gate and has no gradient.
    parameters.in_bias.data.mul_(0.05)
    x = LAYOUTS[layout](x.detach().to(dtype)).requires_grad_()
    assert_matches(
        fourier_mix, fourier_mix, (x, parameters), gradients=dtype == torch.float32, training=training, momentum=0.0
    )


def test_a_large_mean_stays_finite():
    """The DC bin of a constant image grows with the side; sigmoid and GELU must not overflow."""
    branch = FourierBranch(4).eval()
    x = torch.full((1, 4, 256, 256), 1e4) + torch.randn(1, 4, 256, 256)
    x.requires_grad_()
    y = branch(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    branch = FourierBranch(3).train(training)
    before = {name: tensor.clone() for name, tensor in branch.state_dict().items() if "running" in name}
    x = torch.randn(0, 3, 7, 8, requires_grad=True)
    y = branch(x)
    y.sum().backward()
    assert y.shape == (0, 3, 7, 8)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in branch.parameters())
    for name, tensor in before.items():
        assert torch.equal(branch.state_dict()[name], tensor)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FourierBranch(2)(torch.randn(1, 2, 1, 1))
    assert FourierBranch(2).eval()(torch.randn(1, 2, 1, 1)).shape == (1, 2, 1, 1)


@pytest.mark.parametrize("name", ["training", "momentum", "eps", "track_running_stats"])
def test_normalisations_must_agree(name):
    branch = FourierBranch(2)
    setattr(branch.value_bn, name, False if name in ("training", "track_running_stats") else 0.5)
    with pytest.raises(ValueError, match=name):
        branch(torch.randn(2, 2, 4, 4))


@pytest.mark.parametrize(("options", "name"), [({"dim": 0}, "dim"), ({"dim": 4, "layout": "planar"}, "layout")])
def test_constructor_errors(options, name):
    with pytest.raises(ValueError, match=name):
        FourierBranch(**options)
