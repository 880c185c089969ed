"""Exported networks: one program for every size, and the files that the examples write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, randomise, rel_rms
from torch import Tensor
from torch.export import Dim

import swformer_fast as sf
from swformer_fast.reference import network as reference

# torch's exporters copy what they warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")

OPTIONS: dict[str, Any] = {"widths": (4, 8, 8), "depths": (1, 1, 1, 1, 1)}
FREE = {0: Dim("batch", min=1), 2: Dim("height", min=16, max=4096), 3: Dim("width", min=16, max=4096)}
SIZES = [(1, 16, 16), (3, 17, 100), (2, 64, 48), (1, 37, 50)]


def network(**options: Any) -> sf.SWFormer:
    return randomise(sf.SWFormer(**{**OPTIONS, **options})).eval().requires_grad_(False)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [*range(16, 50), 255, 256, 257])
def test_padding_for_any_size_is_that_of_pad(size: int) -> None:
    image = torch.randn(2, 3, size, 33)
    assert torch.equal(reference.reflected(image, 2), F.pad(image, (0, 0, 0, -size % 16), mode="reflect"))
    image = image.mT
    assert torch.equal(reference.reflected(image, 3), F.pad(image, (0, -size % 16, 0, 0), mode="reflect"))


@pytest.mark.parametrize(
    ("options", "grad", "strict"),
    [
        ({"exit": "large"}, False, False),
        ({"exit": "small"}, True, False),
        ({"exits": ("small", "medium")}, False, False),
        ({"all_scales": True}, True, False),
        pytest.param({"exit": "large"}, False, True, marks=pytest.mark.slow),
    ],
)
def test_one_program_for_every_size(options: dict[str, Any], grad: bool, strict: bool) -> None:
    """With and without gradients a block is of other operators."""
    model = network()

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> Any:
            return self.model(image, **options)

    image = torch.rand(2, 3, 37, 50)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(Call(), (image,), dynamic_shapes=(FREE,), strict=strict).module()
    for batch, height, width in SIZES:
        image = torch.rand(batch, 3, height, width)
        with torch.set_grad_enabled(grad):
            actual, expected = program(image), model(image, **options)
        for a, e in zip(*((y if isinstance(y, tuple) else (y,)) for y in (actual, expected)), strict=True):
            assert torch.equal(a, e)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        program(torch.rand(1, 3, 15, 40))


@pytest.fixture
def weights(tmp_path: Path) -> str:
    pytest.importorskip("safetensors")
    sf.pretrained.save_weights(network(), tmp_path / "model.safetensors", None)
    return str(tmp_path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "exit"), [("fp32", "large"), ("bf16", "small")])
def test_a_package(dtype: str, exit: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import export_package

    out = tmp_path / "model.pt2"
    argv = ["--weights", weights, "--exit", exit, "--dtype", dtype, "--out", str(out)]
    assert export_package.main(argv) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    run = torch._inductor.aoti_load_package(str(out))
    image = torch.rand(3, 3, 50, 21).to(export_package.DTYPES[dtype])
    expected = sf.SWFormer.from_pretrained(weights, exit=exit)(image.float())
    assert rel_rms(run(image), expected) <= TOLERANCE[image.dtype]


def onnx_network() -> sf.SWFormer:
    torch.manual_seed(0)
    return network(exit="medium", layout="concatenated", pool="max", depths=(2, 1, 1, 1, 1))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    import export_onnx

    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx.export(onnx_network(), path)
    return path


@pytest.mark.slow
def test_an_onnx_graph_is_of_products_and_convolutions(onnx_file: Path) -> None:
    import onnx

    graph = onnx.load(onnx_file).graph
    onnx.checker.check_model(onnx_file)
    kinds = {node.op_type for node in graph.node}
    assert {"MatMul", "Conv", "ConvTranspose"} <= kinds
    assert not kinds & {"DFT", "STFT", "If", "Loop"}
    assert {node.domain for node in graph.node} == {""}
    for value, name in ((graph.input[0], "image"), (graph.output[0], "restored")):
        shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert (value.name, shape) == (name, ["batch", 3, "height", "width"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_runtime_computes_what_the_reference_does(name: str, onnx_file: Path) -> None:
    pytest.importorskip(name)
    import export_onnx

    model, run = onnx_network(), export_onnx.RUNTIMES[name](onnx_file)
    exact = sf.reference.SWFormer(**model.options).eval().requires_grad_(False)
    exact.load_state_dict(model.state_dict())
    exact.double()
    for batch, height, width in [*SIZES, (1, 200, 16)]:
        image = torch.rand(batch, 3, height, width)
        assert rel_rms(run(image) - image, exact(image.double()) - image) <= TOLERANCE[torch.float32]


@pytest.mark.slow
def test_exporting_a_file(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    import export_onnx

    out = tmp_path / "model.onnx"
    assert export_onnx.main(["--weights", weights, "--exit", "small", "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]


@pytest.mark.parametrize(
    ("script", "step", "form"), [("export_package", "compile_package", "pt2"), ("export_onnx", "export", "onnx")]
)
def test_what_errs_is_not_kept(
    script: str,
    step: str,
    form: str,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if script == "export_onnx":
        pytest.importorskip("onnxscript")
    module, out = __import__(script), tmp_path / f"new.{form}"
    out.write_text("old")

    def wrong(content: object, path: Path) -> Any:
        path.write_text("new")
        return lambda image: 1.01 * image

    monkeypatch.setattr(module, step, wrong)
    if script == "export_onnx":
        monkeypatch.setattr(module, "runtimes", lambda path: [("runtime", lambda image: 1.01 * image)])
    else:
        monkeypatch.setattr(module, "export", lambda model: None)
    assert module.main(["--weights", weights, "--out", str(out)]) == 1
    assert "not kept: the error is above 1e-05" in capsys.readouterr().out
    assert out.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", out.name]


@pytest.mark.parametrize("script", ["export_package", "export_onnx"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "one of the arguments --weights --preset is required"),
        (["--weights", "missing.safetensors"], "name_or_path must be a file"),
        (["--weights", "model.safetensors", "--out", "model.bin"], "argument --out: must end in ."),
        (["--weights", "small.safetensors", "--exit", "large"], "exit must be at most 'small'"),
    ],
)
def test_errors_are_told_in_a_line(
    script: str,
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("safetensors")
    if script == "export_onnx":
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    sf.pretrained.save_weights(network(exit="small"), "small.safetensors")
    with pytest.raises(SystemExit):
        __import__(script).main(options)
    assert words in capsys.readouterr().err
