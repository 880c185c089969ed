"""Export an SWFormer to ONNX, for images of any size from 16 x 16: for ONNX Runtime, OpenVINO and the like.

    python examples/export_onnx.py --weights tiny-haze --exit medium --out haze.onnx

Few runtimes have a Fourier transform that is fast, or any: here it is a product with matrices of cosines and sines,
computed in the graph from the image's size. Its cost grows with the side, so tile large images. Haar transforms are
convolutions. The file is compared with the network in fp64, in the runtimes that are installed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from exports import compare, example, export_parser, network
from onnxscript import FLOAT, INT64
from onnxscript import opset18 as op
from runs import write_atomically
from torch import Tensor

import swformer_fast as sf
from swformer_fast.reference.fourier_mix import inverse_spectrum as reference_inverse
from swformer_fast.reference.fourier_mix import spectrum as reference_spectrum

TOLERANCE = 1e-5


@torch.library.custom_op("swformer_export::spectrum", mutates_args=())
def spectrum(x: Tensor) -> Tensor:
    """The reference's, an operator for which the exporter finds `onnx_spectrum`."""
    return reference_spectrum(x)


@spectrum.register_fake
def _(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, 2 * channels, height, width // 2 + 1)


@torch.library.custom_op("swformer_export::inverse_spectrum", mutates_args=())
def inverse_spectrum(y: Tensor) -> Tensor:
    """The reference's, to an even width: the network's maps have no other."""
    return reference_inverse(y, (y.shape[2], 2 * y.shape[3] - 2))


@inverse_spectrum.register_fake
def _(y: Tensor) -> Tensor:
    batch, channels, height, frequencies = y.shape
    return y.new_empty(batch, channels // 2, height, 2 * frequencies - 2)


def ints(*values: int) -> INT64:
    return op.Constant(value_ints=values)


def side(x: FLOAT, dim: int) -> INT64:
    return op.Shape(x, start=dim, end=dim + 1)


def dft(count: INT64, frequencies: INT64) -> tuple[FLOAT, FLOAT]:
    """Cosines and sines of the orthonormal transform, (count, frequencies) each."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    n, k = (op.Range(zero, op.Squeeze(end), one) for end in (count, frequencies))
    # In integers: fp32 has no digits left for an angle of many turns.
    part = op.Cast(op.Mod(op.Mul(op.Unsqueeze(n, ints(1)), k), count), to=FLOAT.dtype)
    length = op.Cast(count, to=FLOAT.dtype)
    angle = op.Mul(part, op.Div(op.Constant(value_float=2 * math.pi), length))
    return op.Div(op.Cos(angle), op.Sqrt(length)), op.Div(op.Sin(angle), op.Sqrt(length))


def onnx_spectrum(x: FLOAT) -> FLOAT:
    batch, height, width = side(x, 0), side(x, 2), side(x, 3)
    frequencies = op.Add(op.Div(width, ints(2)), ints(1))
    cos, sin = dft(width, frequencies)
    parts = op.Concat(op.MatMul(x, cos), op.Neg(op.MatMul(x, sin)), axis=2)  # the real rows above the imaginary ones
    cos, sin = dft(height, height)
    both = op.Concat(op.Concat(cos, sin, axis=1), op.Concat(op.Neg(sin), cos, axis=1), axis=0)
    shape = op.Concat(batch, ints(-1), height, frequencies, axis=0)  # real and imaginary channels in turn
    return op.Reshape(op.MatMul(both, parts), shape)


def onnx_inverse_spectrum(y: FLOAT) -> FLOAT:
    batch, height, frequencies = side(y, 0), side(y, 2), side(y, 3)
    parts = op.Reshape(y, op.Concat(batch, ints(-1), op.Mul(height, ints(2)), frequencies, axis=0))
    cos, sin = dft(height, height)
    real = op.MatMul(op.Concat(cos, op.Neg(sin), axis=1), parts)
    imag = op.MatMul(op.Concat(sin, cos, axis=1), parts)
    # All frequencies but the first and the last stand for their negatives too.
    twos = op.Expand(op.Constant(value_floats=[2.0]), op.Sub(frequencies, ints(2)))
    twice = op.Pad(twos, ints(1, 1), op.Constant(value_float=1.0))
    cos, sin = dft(op.Mul(op.Sub(frequencies, ints(1)), ints(2)), frequencies)
    cos, sin = (op.Transpose(op.Mul(part, twice), perm=[1, 0]) for part in (cos, sin))
    return op.Sub(op.MatMul(real, cos), op.MatMul(imag, sin))


TRANSLATIONS = {
    torch.ops.swformer_export.spectrum.default: onnx_spectrum,
    torch.ops.swformer_export.inverse_spectrum.default: onnx_inverse_spectrum,
}


class FourierBranch(sf.reference.FourierBranch):
    def forward(self, x: Tensor) -> Tensor:
        u, v = (self.laid_out(spectrum(part)) for part in self.conv_in(x).chunk(2, dim=1))
        y = self.gate_conv(self.gate_bn(u)).sigmoid() * F.gelu(self.value_conv(self.value_bn(v)))
        return self.conv_out(inverse_spectrum(self.laid_out(y, back=True)))

    def laid_out(self, y: Tensor, back: bool = False) -> Tensor:
        """From interleaved real and imaginary channels to those of the option, or back."""
        if self.layout == "interleaved":
            return y
        return y.unflatten(1, (2, -1) if back else (-1, 2)).transpose(1, 2).flatten(1, 2)


class Mixer(sf.reference.MultiDomainMixer):
    fourier_type = FourierBranch


class Block(sf.reference.SWFormerBlock):
    mixer_type = Mixer


class Network(sf.reference.SWFormer):
    """The reference with matrix products for Fourier transforms."""

    block_type = Block


def as_network(model: sf.SWFormer) -> Network:
    exportable = Network(**model.options)
    exportable.load_state_dict(model.state_dict())
    return exportable.eval().requires_grad_(False)


def export(model: sf.SWFormer, path: Path) -> None:
    """Write (batch, C, height, width) "image" -> "restored" in fp32; one file, weights included."""
    # The exporter would settle on maps of more than one pixel; the graph, which asks nothing, takes sides of 16 too.
    image, free = example(model, least=17)
    program = torch.onnx.export(
        as_network(model),
        (image,),
        input_names=["image"],
        output_names=["restored"],
        dynamic_shapes=free,
        dynamo=True,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    program.save(path, external_data=False)


def onnxruntime_session(path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def openvino_model(path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda image: torch.from_numpy(compiled(image.numpy())[0].copy())


RUNTIMES = {"onnxruntime": onnxruntime_session, "openvino": openvino_model}


def runtimes(path: Path) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Those that are installed, with the file loaded."""
    for name, load in RUNTIMES.items():
        if find_spec(name):
            yield name, load(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = export_parser(__doc__, ".onnx")
    args = parser.parse_args(argv)
    model = network(parser, args)
    exact = sf.reference.SWFormer(**model.options).eval()
    exact.load_state_dict(model.state_dict())
    exact.double()

    def compared(path: Path) -> None:
        print(f"exporting to {args.out}", flush=True)
        export(model, path)
        if not any(map(find_spec, RUNTIMES)):
            print(f"not compared: none of {', '.join(RUNTIMES)} is installed")
        for name, run in runtimes(path):
            print(f"comparing {name} with the network in fp64")
            compare(run, exact, model.in_channels, TOLERANCE)

    try:
        write_atomically(args.out, compared)
    except ValueError as error:
        print(f"not kept: {error}")
        return 1
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
