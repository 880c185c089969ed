"""The parameters of an op by name: bundles, which `flatten` turns into flat arguments and `unflatten` back."""

import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

_Bundle = TypeVar("_Bundle", bound=tuple[Any, ...])


class Norm(NamedTuple):
    """Batch normalisation of C channels: nn.BatchNorm2d's tensors, (C,) each.

    Both running statistics may be None: then the batch's are used.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor
    bias: Tensor


class Convolution(NamedTuple):
    """nn.Conv2d's tensors: (out, in / groups, k, k) and (out,)."""

    weight: Tensor
    bias: Tensor


class SpatialParameters(NamedTuple):
    """Of `depthwise_gelu`: (C, 1, k, k) and (C,)."""

    weight: Tensor
    bias: Tensor


class WaveletParameters(NamedTuple):
    """Of `wavelet_mix`: (4 * C, 1, k, k), (4 * C,) and two taps each."""

    weight: Tensor
    bias: Tensor
    dec_lo: Tensor
    dec_hi: Tensor
    rec_lo: Tensor
    rec_hi: Tensor


class Factor(NamedTuple):
    """One factor of the Fourier branch's product: a normalisation and a 1x1 convolution of its 2 * C channels."""

    norm: Norm
    weight: Tensor
    bias: Tensor


class FourierParameters(NamedTuple):
    """Of `fourier_mix`: in_weight (2 * C, D, 1, 1), in_bias (2 * C,); out_weight (E, C, 1, 1), out_bias (E,).

    Both of the last may be None: no last convolution, E = C.
    """

    in_weight: Tensor
    in_bias: Tensor
    gate: Factor
    value: Factor
    out_weight: Tensor | None
    out_bias: Tensor | None

    @property
    def factors(self) -> tuple[Factor, Factor]:
        return self.gate, self.value


class FfnParameters(NamedTuple):
    """Of `multiscale_ffn`: in_weight (3 * M, D, 1, 1), in_bias (3 * M,); a depthwise convolution, (M, 1, k, k) and
    (M,), at each of the scales 1, 2 and 4; out_weight (E, 3 * M, 1, 1), out_bias (E,)."""

    in_weight: Tensor
    in_bias: Tensor
    depthwise: tuple[Convolution, Convolution, Convolution]
    out_weight: Tensor
    out_bias: Tensor


class AttentionParameters(NamedTuple):
    """Of `channel_attention`: w1 (R, C, 1, 1), b1 (R,), w2 (C, R, 1, 1), b2 (C,)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class MixerParameters(NamedTuple):
    """Of a `MultiDomainMixer` with default split and order."""

    conv_in: Convolution
    spatial: SpatialParameters
    wavelet: WaveletParameters
    fourier: FourierParameters
    attention: AttentionParameters
    conv_out: Convolution


class BlockParameters(NamedTuple):
    """Of a `SWFormerBlock` with default options: beta and gamma are (1, D, 1, 1)."""

    norm1: Norm
    mixer: MixerParameters
    beta: Tensor
    norm2: Norm
    ffn: FfnParameters
    gamma: Tensor


def flatten(bundle: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The tensors of a bundle, in the order of its fields."""
    tensors: list[Tensor | None] = []
    _append(bundle, tensors)
    return tuple(tensors)


def _append(bundle: tuple[Any, ...], tensors: list[Tensor | None]) -> None:
    for part in bundle:
        if isinstance(part, tuple):
            _append(part, tensors)
        else:
            tensors.append(part)


def unflatten(kind: type[_Bundle], tensors: Sequence[Any]) -> _Bundle:
    """The inverse of `flatten`."""
    count, build = _builder(kind)
    if len(tensors) != count:
        raise ValueError(f"tensors must be as many as {kind.__name__} has, {count}, got {len(tensors)}")
    return typing.cast(_Bundle, build(iter(tensors)))


@cache
def _builder(kind: Any) -> tuple[int, Callable[[Iterator[Any]], Any]]:
    """How many tensors one holds, and what makes one of the next so many: it runs at every call of an op."""
    if typing.get_origin(kind) is tuple:
        make, parts = tuple, typing.get_args(kind)
    elif kind in _FIELDS:
        make, parts = kind._make, _FIELDS[kind]
    else:
        return 1, next
    counts, builds = zip(*map(_builder, parts), strict=True)
    return sum(counts), lambda tensors: make([build(tensors) for build in builds])


_FIELDS: dict[Any, tuple[Any, ...]] = {
    kind: tuple(typing.get_type_hints(kind).values())
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
}
