"""Files of weights: what is written is read back, by others too, and what cannot be read is told in a sentence."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn

pytest.importorskip("safetensors")
hub = pytest.importorskip("huggingface_hub")

from safetensors.torch import load_file, save_file

import swformer_fast as sf
from swformer_fast import pretrained

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = {"widths": (4, 8, 8), "depths": (1, 2, 1, 1, 1)}
ORDER = ("wavelet", "spatial", "fourier")
IMAGE = torch.rand(1, 3, 21, 34, generator=torch.Generator().manual_seed(0))


def network(**options: Any) -> sf.SWFormer:
    torch.manual_seed(0)
    return randomise(sf.SWFormer(**{**OPTIONS, **options})).eval()  # type: ignore[return-value]


def restored(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(IMAGE, **options)


def rounded(model: sf.SWFormer) -> sf.SWFormer:
    """With the weights that fp16 holds."""
    return model.half().float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# what is written is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exit": "small"},
        {"exit": "medium", "skip": "add"},
        {"fusion": "concat", "skip": "add", "in_channels": 3},
        {
            "pyramid": "pixel_unshuffle",
            "norm_position": "post",
            "pool": "max",
            "order": ("wavelet", "spatial", "fourier"),
        },
        {
            "split": (2, 1, 0.5),
            "ffn_ratio": 6,
            "spatial_kernel": 5,
            "wavelet_kernel": 1,
            "ffn_kernel": 5,
            "reduction": 3,
        },
    ],
)
def test_a_folder_is_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = network(**options)
    model.save_pretrained(tmp_path)
    loaded = sf.SWFormer.from_pretrained(tmp_path)
    assert type(loaded) is sf.SWFormer
    assert not loaded.training
    assert torch.equal(restored(loaded), restored(model))
    assert json.loads(json.dumps(loaded.options)) == json.loads(json.dumps(model.options))
    (tmp_path / "config.json").unlink()  # the file alone says as much
    assert torch.equal(restored(sf.SWFormer.from_pretrained(str(tmp_path))), restored(model))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "model.safetensors"]


def test_a_file_of_half_precision_and_what_it_says(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "new" / "tiny-haze.safetensors"
    pretrained.save_weights(model, path, task="haze", psnr=31.5)
    state, options, metadata = pretrained.load_weights(path)
    assert {t.dtype for t in state.values()} == {torch.float16, torch.int64}
    assert metadata == {"task": "haze", "psnr": "31.5"}
    assert options == {**model.options, "widths": [4, 8, 8], "depths": [1, 2, 1, 1, 1]}
    loaded = sf.SWFormer.from_pretrained(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(restored(loaded), restored(rounded(model)))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("exit", sf.EXITS)
def test_an_exit_is_a_part_of_the_file(exit: str, folder: Path) -> None:
    loaded = sf.SWFormer.from_pretrained(folder, exit=exit)
    assert loaded.exit == exit
    assert len(loaded.heads) == 1 + sf.EXITS.index(exit)
    assert torch.equal(restored(loaded), restored(network(), exit=exit))


def test_an_exit_that_the_file_lacks(tmp_path: Path) -> None:
    network(exit="medium").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"exit must be at most 'medium', where .*model\.safetensors ends, got 'large'"
    ):
        sf.SWFormer.from_pretrained(tmp_path, exit="large")
    with pytest.raises(ValueError, match="exit must be one of 'small'"):
        sf.SWFormer.from_pretrained(tmp_path, exit="huge")


def test_names_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    assert pretrained.names() == []
    for name in ("tiny-snow", "tiny-haze"):
        pretrained.save_weights(network(), tmp_path / f"{name}.safetensors")
    assert pretrained.names() == ["tiny-haze", "tiny-snow"]
    assert torch.equal(restored(sf.SWFormer.from_pretrained("tiny-haze")), restored(rounded(network())))
    with pytest.raises(ValueError, match="got 'tiny-hail'; the package comes with 'tiny-haze', 'tiny-snow'"):
        sf.SWFormer.from_pretrained("tiny-hail")


@pytest.mark.parametrize("name", pretrained.names())
def test_every_file_of_the_package(name: str) -> None:
    model = sf.SWFormer.from_pretrained(name)
    assert restored(model).isfinite().all()
    assert pretrained.preset_of(model.options) == name.partition("-")[0]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"params": {}, "params_ema": state},
        lambda state: {"step": 3, "optimizer": {"state": {}}, "model": {f"module.{n}": t for n, t in state.items()}},
        lambda state: {"state_dict": {"loss.weight": torch.ones(1), **{f"model.{n}": t for n, t in state.items()}}},
        lambda state: {"n_averaged": torch.tensor(3), **{f"module._orig_mod.{n}": t for n, t in state.items()}},
        lambda state: {n.replace("stages.0.0.", "stages.0.0._orig_mod."): t for n, t in state.items()},
        lambda state: {"ema": {"params": state}},
        lambda state: {"ema": {"decay": 0.99}, "params_ema": {}, "step": 3, "net_g": state, "optimizer": {"state": {}}},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
def test_what_trainers_write(wrap: Any, suffix: str, tmp_path: Path) -> None:
    model = network(exit="medium", split=(2, 1, 1))
    torch.save(wrap(model.state_dict()), tmp_path / f"model{suffix}")
    loaded = sf.SWFormer.from_pretrained(tmp_path / f"model{suffix}")
    assert torch.equal(restored(loaded), restored(model))
    assert loaded.options["depths"] == [1, 2, 1, 1, 1]


def test_a_safetensors_file_that_says_nothing(tmp_path: Path) -> None:
    model = network(pyramid="pixel_unshuffle")
    save_file({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "a.safetensors")
    loaded = sf.SWFormer.from_pretrained(tmp_path / "a.safetensors", pyramid="pixel_unshuffle")
    assert torch.equal(restored(loaded), restored(model))


@pytest.mark.parametrize("exit", sf.EXITS)
@pytest.mark.parametrize("name", sf.PRESETS)
def test_presets_are_inferred(name: str, exit: str) -> None:
    with torch.device("meta"):
        state = sf.SWFormer.from_preset(name, exit=exit).state_dict()
    options = pretrained.infer_options(state)
    assert options["exit"] == exit
    assert pretrained.preset_of(options) == name
    with torch.device("meta"):
        again = sf.SWFormer(**options).state_dict()
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in state.items()}


def test_of_no_preset() -> None:
    assert pretrained.preset_of(network().options) is None


def test_subclasses_and_accelerated_models(folder: Path, tmp_path: Path) -> None:
    class Mine(sf.SWFormer):
        pass

    assert type(Mine.from_pretrained(folder)) is Mine
    reference = sf.reference.SWFormer(**OPTIONS)
    sf.accelerate(reference).save_pretrained(tmp_path)
    assert sf.SWFormer.from_pretrained(tmp_path).state_dict().keys() == reference.state_dict().keys()


def test_writing_is_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        network(exit="small").save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match="model must be an SWFormer, got DataParallel"):
        pretrained.save_weights(nn.DataParallel(network()), path)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*model\.pth"):
        pretrained.save_weights(network(), path.with_suffix(".pth"))
    for dtype in ("fp16", torch.int8):
        with pytest.raises(TypeError, match=r"dtype must be a floating torch\.dtype or None, got "):
            pretrained.save_weights(network(), path, dtype)
    model = network()
    model.heads[0].weight.data[0] = -1e5
    with pytest.raises(ValueError, match=r"the numbers of 'heads\.0\.weight', got torch\.float16: they reach 100000"):
        pretrained.save_weights(model, path)
    assert not path.exists()
    pretrained.save_weights(model, path, torch.bfloat16)


# what cannot be read --------------------------------------------------------------------------------------------------


class Unsafe:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch unsafe",)


def damage(path: Path) -> None:
    """A file of each name, none of which holds a network's weights."""
    pretrained.save_weights(network(), path / "whole.safetensors")
    state = network().state_dict()
    torch.save(state, path / "whole.pth")
    for name in ("whole.safetensors", "whole.pth"):
        (path / name.replace("whole", "cut")).write_bytes((path / name).read_bytes()[:2000])
        (path / name.replace("whole", "empty")).touch()
        (path / name.replace("whole", "text")).write_text("<html>404</html>" * 20)
    torch.save({"weight": torch.ones(3)}, path / "foreign.pth")
    torch.save([1, 2], path / "list.pth")
    torch.save({"state_dict": state, "args": Namespace(lr=1)}, path / "namespace.pth")
    torch.save({"state_dict": Unsafe()}, path / "unsafe.pth")
    (path / "unsafe.ckpt").write_bytes(pickle.dumps(Unsafe()))
    save_file({"weight": torch.ones(3)}, path / "foreign.safetensors")
    torch.save({**state, "stages.0.0.beta": torch.ones(5)}, path / "shape.pth")
    torch.save({**state, "embeddings.0.weight": torch.ones(5)}, path / "rank.pth")
    torch.save({**state, "more": torch.ones(5)}, path / "more.pth")
    torch.save({name: t for name, t in state.items() if name != "stages.1.1.beta"}, path / "less.pth")
    for name, config in {
        "text": "large",
        "list": "[1]",
        "exit": '{"exit": "huge"}',
        "option": '{"colour": 1}',
        "width": '{"widths": [120000000, 4, 4]}',
        "depth": '{"depths": [1, 1, "1", 1, 1]}',
    }.items():
        save_file(state, path / f"config_{name}.safetensors", {"format": "pt", "config": config})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("cut.safetensors", "cannot be read: it is damaged or of another kind"),
        ("empty.safetensors", "cannot be read: it is damaged or of another kind"),
        ("text.safetensors", "cannot be read: it is damaged or of another kind"),
        ("cut.pth", "cannot be read: it is damaged or of another kind"),
        ("empty.pth", "cannot be read: it is damaged or of another kind"),
        ("text.pth", "cannot be read: it is damaged or of another kind$"),
        ("unsafe.pth", r"cannot be read: it is not safe to load, as it asks for \w+\.system"),
        ("unsafe.ckpt", "cannot be read: it is damaged or of another kind"),
        ("namespace.pth", r"cannot be read: it is not safe to load, as it asks for argparse\.Namespace"),
        ("foreign.pth", "holds no weights of an SWFormer: there is no 'embeddings.0.weight'"),
        ("list.pth", "holds no weights of an SWFormer: there is no 'embeddings.0.weight'"),
        ("foreign.safetensors", "holds no weights of an SWFormer: there is no 'embeddings.0.weight'"),
        ("rank.pth", r"holds no weights of an SWFormer: 'embeddings.0.weight' has shape \(5,\)"),
        ("shape.pth", r"does not fit its options: 'stages.0.0.beta' must have shape \(1, 4, 1, 1\), got \(5,\)"),
        ("more.pth", "does not fit its options: there is no place for 'more'"),
        ("less.pth", "does not fit its options: there is no 'stages.1.1.beta'"),
        ("config_text.safetensors", "holds no weights of an SWFormer: Expecting value"),
        ("config_list.safetensors", "holds no weights of an SWFormer: config must be an object"),
        ("config_exit.safetensors", "holds no weights of an SWFormer: exit must be one of"),
        ("config_option.safetensors", "has options that no SWFormer has: .*colour"),
        ("config_width.safetensors", "does not fit its options: 'embeddings.0.weight' must have shape"),
        ("config_depth.safetensors", "has options that no SWFormer has: depths must be an int"),
    ],
)
def test_what_is_wrong_with_a_file(file: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path / file} {words}") as told:
        sf.SWFormer.from_pretrained(tmp_path / file)
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 400
    assert told.value.__suppress_context__ or told.value.__context__ is None
    assert not (tmp_path / "unsafe").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny-hail", "user/repository or a name that comes with the package, got 'tiny-hail'; the package comes with"),
        ("a/b/c", "must be a file, a folder"),
        ("../model", "must be a file, a folder"),
        ("folder/model.safetensors", "must be a file, a folder"),
        (Path("user/model"), "must be a file, a folder"),
        ("note.txt", r"note\.txt must end in \.safetensors, \.pth, \.pt, \.ckpt"),
        ("empty", "empty must hold model.safetensors"),
        ("broken", r"config\.json holds no options of an SWFormer: Expecting"),
    ],
)
def test_what_is_no_model(name: str | Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("note.txt").touch()
    Path("empty").mkdir()
    network().save_pretrained("broken")
    Path("broken/config.json").write_text("{")
    with pytest.raises(ValueError, match=words):
        sf.SWFormer.from_pretrained(name)


# the Hub --------------------------------------------------------------------------------------------------------------


def test_a_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or folder)
    loaded = sf.SWFormer.from_pretrained("user/model", exit="small", revision="v1", token="secret")
    assert torch.equal(restored(loaded), restored(network(), exit="small"))
    ((repo, options),) = asked
    assert (repo, options["revision"], options["token"]) == ("user/model", "v1", "secret")
    assert options["allow_patterns"] == ["config.json", "model.safetensors"]


def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"'user/model' is no file, and not on the Hub \(.*\); the package comes with"):
        sf.SWFormer.from_pretrained("user/model", cache_dir=tmp_path, local_files_only=True)


def test_a_package_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("huggingface_hub", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"'user/model' is no file, and huggingface_hub is missing: .* comes with"):
        sf.SWFormer.from_pretrained("user/model")
    with pytest.raises(ImportError, match=r"^safetensors is missing: pip install .*\[hub\]"):
        sf.SWFormer.from_pretrained(folder)


@pytest.mark.parametrize("described", [False, True])
def test_upload(described: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = network(), {}

    def upload(*, repo_id: str, folder_path: Path, token: str, **options: Any) -> str:
        seen.update(options, repo_id=repo_id, token=token)
        seen["card"] = (folder_path / "README.md").read_text() if (folder_path / "README.md").exists() else None
        seen["output"] = restored(sf.SWFormer.from_pretrained(folder_path))
        return "commit"

    monkeypatch.setattr(
        hub, "create_repo", lambda repo, **options: seen.update(options) or Namespace(repo_id=f"user/{repo}")
    )
    monkeypatch.setattr(hub, "upload_folder", upload)
    monkeypatch.setattr(
        hub,
        "file_exists",
        lambda *asked, **options: described and (asked, options["token"]) == (("user/model", "README.md"), "secret"),
    )
    assert model.push_to_hub("model", private=True, token="secret", commit_message="first") == "commit"
    assert torch.equal(seen.pop("output"), restored(model))
    card = seen.pop("card")
    assert card is None if described else 'from_pretrained("user/model")' in card
    assert seen == {
        "repo_id": "user/model",
        "token": "secret",
        "private": True,
        "exist_ok": True,
        "commit_message": "first",
    }


def test_the_card(tmp_path: Path) -> None:
    model = sf.SWFormer.from_preset("tiny", exit="medium")
    model.save_pretrained(tmp_path / "user" / "model", torch.float16, task="haze", psnr=31.5)
    path = tmp_path / "user" / "model" / "README.md"
    card = hub.ModelCard.load(path)
    assert card.data.license == "apache-2.0"
    assert 'from_pretrained("user/model")' in card.text
    assert "not the authors'" in card.text
    for row in ("| preset | tiny |", "| last exit | medium |", "| task | haze |", "| psnr | 31.5 |"):
        assert row in card.text
    path.write_text("my own")
    model.save_pretrained(path.parent)
    assert path.read_text() == "my own"


def test_words_of_other_languages(tmp_path: Path) -> None:
    """Wherever the system's encoding is another one, as on Windows."""
    code = "import sys, swformer_fast as sf\n"
    code += "sf.SWFormer.from_preset('tiny').save_pretrained(sys.argv[1], author='\\u0141ukasz')"
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    run = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(run, check=True, env={**environment, "PYTHONPATH": path})
    assert "| author | Łukasz |" in (tmp_path / "README.md").read_text("utf-8")


class Ours(sf.SWFormer, hub.PyTorchModelHubMixin):
    """Its methods are this package's."""


class Theirs(hub.PyTorchModelHubMixin, sf.SWFormer):
    """Its methods are the Hub's."""


@pytest.mark.parametrize("kind", [Ours, Theirs])
@pytest.mark.parametrize("options", [{}, {"exit": "medium", "split": (2, 1, 1), "pool": "max"}])
def test_the_mixin_of_the_hub(kind: type[sf.SWFormer], options: dict[str, Any], tmp_path: Path) -> None:
    model = network(**options)
    model.save_pretrained(tmp_path / "ours")
    loaded = kind.from_pretrained(tmp_path / "ours")
    assert type(loaded) is kind
    assert torch.equal(restored(loaded), restored(model))
    other = kind(**{**OPTIONS, **options})
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["widths"] == [4, 8, 8]
    assert load_file(tmp_path / "theirs" / "model.safetensors").keys() == model.state_dict().keys()
    assert torch.equal(restored(sf.SWFormer.from_pretrained(tmp_path / "theirs")), restored(model))
