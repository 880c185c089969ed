"""spandrel's loader knows the files of an SWFormer, and no others by it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from helpers import assert_close, randomise

pytest.importorskip("safetensors")

# Two of spandrel's architectures, which are not used here, import torchvision, of which PyPI has no build for CPUs.
STAND_INS = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
missing = () if importlib.util.find_spec("torchvision") else STAND_INS
sys.modules |= {name: MagicMock() for name in missing}
try:
    spandrel = pytest.importorskip("spandrel")
finally:
    for name in missing:
        del sys.modules[name]

import swformer_fast as sf
from swformer_fast import pretrained
from swformer_fast.spandrel import detect, install


@pytest.fixture
def registry() -> spandrel.ArchRegistry:
    registry = spandrel.MAIN_REGISTRY.copy()
    install(registry=registry)
    return registry


@pytest.fixture(scope="module")
def model() -> sf.SWFormer:
    return randomise(sf.SWFormer.from_preset("tiny")).half().float().eval()


@pytest.fixture(scope="module")
def file(model: sf.SWFormer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    pretrained.save_weights(model, path)
    return path


@pytest.mark.parametrize("exit", [None, *sf.EXITS])
def test_a_file(exit: str | None, model: sf.SWFormer, file: Path, registry: spandrel.ArchRegistry) -> None:
    install(exit, registry)
    loaded = spandrel.ModelLoader(registry=registry).load_from_file(file)
    assert isinstance(loaded, spandrel.ImageModelDescriptor)
    assert isinstance(loaded.model, sf.SWFormer)
    assert (loaded.architecture.id, loaded.architecture.name) == ("SWFormer", "SWFormer")
    assert (loaded.purpose, loaded.scale, loaded.input_channels, loaded.output_channels) == ("Restoration", 1, 3, 3)
    assert loaded.tags == ["tiny", exit or "large"]
    assert loaded.supports_half
    assert loaded.supports_bfloat16
    assert loaded.tiling == spandrel.ModelTiling.SUPPORTED
    assert loaded.size_requirements.minimum == 16
    image = torch.rand(1, 3, 19, 33)
    with torch.no_grad():
        expected = model(image, exit=exit).clamp(0, 1)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(image), expected)
    assert loaded(image[..., :9, :12]).shape == (1, 3, 9, 12)
    assert_close(loaded.bfloat16()(image.bfloat16()), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_what_trainers_write(prefix: str, registry: spandrel.ArchRegistry) -> None:
    grey = sf.SWFormer(in_channels=1, widths=(4, 8, 8), depths=(2, 1, 1, 1, 1), exit="medium")
    state = {prefix + name: tensor for name, tensor in grey.state_dict().items()}
    loaded = registry.load({"params_ema": state})
    assert loaded.tags == ["medium"]
    assert loaded.input_channels == 1
    assert all(map(torch.equal, loaded.model.state_dict().values(), state.values()))


def test_an_exit_that_the_file_lacks(registry: spandrel.ArchRegistry) -> None:
    install("large", registry)
    state = sf.SWFormer.from_preset("tiny", exit="small").state_dict()
    with pytest.raises(ValueError, match="exit must be at most 'small', where the file ends, got 'large'"):
        registry.load(state)
    with pytest.raises(ValueError, match="exit must be one of"):
        install("huge", registry)


def test_no_other_architecture_knows_its_files(model: sf.SWFormer, registry: spandrel.ArchRegistry) -> None:
    for exit in sf.EXITS:
        state = sf.SWFormer.from_preset("tiny", exit=exit).state_dict()
        known = {support.architecture.id for support in registry if support.detect(state)}
        assert known == {"SWFormer"}


@pytest.mark.parametrize("name", ["Compact", "DnCNN", "DRUNet", "FFTformer", "NAFNet"])
def test_it_knows_no_other_files(name: str) -> None:
    kind = getattr(importlib.import_module(f"spandrel.architectures.{name}"), name)
    with torch.device("meta"):
        state = kind().state_dict()
    assert state
    assert not detect(state)


def test_the_main_registry() -> None:
    """What hosts use; installing again changes the exit."""
    before = len(spandrel.MAIN_REGISTRY)
    install()
    install("medium")
    assert len(spandrel.MAIN_REGISTRY) == before + 1
    assert spandrel.MAIN_REGISTRY["SWFormer"].architecture.exit == "medium"
