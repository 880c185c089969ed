"""Files of weights: those that come with the package, local ones, and those of the Hugging Face Hub.

A file is safetensors whose metadata hold the constructor's options as JSON ("config") and whatever else was said about
the weights. Importing this loads neither safetensors nor huggingface_hub.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._files import replacing
from .reference import EXITS, PRESETS, SWFormer
from .reference.common import check_choice

_NETWORK = TypeVar("_NETWORK", bound=SWFormer)

FOLDER = Path(__file__).parent / "weights"
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
NESTS = ("params_ema", "ema", "params", "state_dict", "model", "model_state_dict")
"""Names under which trainers keep a state_dict in a checkpoint, the one to take first; any other comes after them."""
FIRST = "embeddings.0.weight"
"""A parameter that every SWFormer has; what stands before it is a wrapper's name."""
CARD = """\
---
license: apache-2.0
library_name: sdo-swformer-fast
pipeline_tag: image-to-image
tags:
- swformer
- image-restoration
---

# SWFormer{title}

Weights of SWFormer, an image restoration network that mixes space, wavelets and frequencies, with an exit at each of
three resolutions (arXiv 2505.05504). Its authors published neither code nor weights: this network is a reconstruction
of matching size and cost, and these weights are not the authors'.

```python
import swformer_fast as sf  # pip install "sdo-swformer-fast[hub]"

model = sf.SWFormer.from_pretrained("{source}")
restored = model(image)  # (B, {channels}, H, W) in [0, 1], H, W >= 16
```

| | |
| --- | --- |
{table}
"""


class Weights(NamedTuple):
    state: dict[str, Tensor]
    """The state_dict, as stored."""
    options: dict[str, Any]
    """The network's constructor options."""
    metadata: dict[str, str]
    """What else the file says: "task", "psnr" and the like."""


def names() -> list[str]:
    """What comes with the package, as `SWFormer.from_pretrained` takes it."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a .safetensors file, or a .pth, .pt or .ckpt file that holds a state_dict as trainers write it.

    A state_dict is found under any name, of `NESTS` first, and behind any prefix ("module.", "_orig_mod.", "model.").
    Pickled files are read with weights_only=True: nothing in them runs. A file that does not tell the options has them
    inferred.

    Raises:
        ValueError: path has another suffix, or the file is damaged, not safe to load, or no SWFormer's.
        OSError: it cannot be read.
        ImportError: safetensors is missing.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        safetensors = _package("safetensors")
        with _readable(path), safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        with _readable(path):
            content = torch.load(path, "cpu", weights_only=True)
    config = metadata.pop("config", None)
    try:
        state = unwrapped(content)
        options = infer_options(state) if config is None else _options(config)
    except ValueError as error:
        raise ValueError(f"{path} holds no weights of an SWFormer: {error}") from None
    return Weights(state, options, {name: text for name, text in metadata.items() if name != "format"})


def save_weights(
    model: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float16, **metadata: Any
) -> None:
    """Write an SWFormer's weights and options to a safetensors file, which is whole or absent.

    Args:
        model: not wrapped: of a compiled or distributed one, the module within.
        path: of the file; its folder is made.
        dtype: of the floating tensors; None: their own.
        metadata: what else to say ("task", "psnr"); no strings are written as JSON.

    Raises:
        TypeError, ValueError: model is no SWFormer; dtype is no floating one; a number is too large for it; path has
            another suffix.
    """
    if not isinstance(model, SWFormer):
        raise TypeError(f"model must be an SWFormer, got {type(model).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    state = {}
    for name, tensor in model.state_dict().items():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A copy each: safetensors refuses tensors that share memory.
        state[name] = tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        if tensor.is_floating_point() and not torch.equal(state[name].isinf(), tensor.isinf().cpu()):
            raise ValueError(f"dtype must hold the numbers of {name!r}, got {kind}: they reach {tensor.abs().max():g}")
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    header = {**words, "format": "pt", "config": json.dumps(model.options)}
    save = _package("safetensors.torch").save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save(state, partial, header)


def unwrapped(content: Any) -> dict[str, Tensor]:
    """The network's own state_dict in what a trainer saved; ValueError where there is none."""
    names = [name for name in content if isinstance(name, str)] if isinstance(content, Mapping) else []
    for name in names:
        prefix = name.removesuffix(FIRST)
        if prefix != name and isinstance(content[name], Tensor):
            state = {n[len(prefix) :].replace("_orig_mod.", ""): content[n] for n in names if n.startswith(prefix)}
            return {n: tensor for n, tensor in state.items() if isinstance(tensor, Tensor)}
    for nest in sorted(names, key=lambda name: NESTS.index(name) if name in NESTS else len(NESTS)):
        if isinstance(content[nest], Mapping):
            with contextlib.suppress(ValueError):
                return unwrapped(content[nest])
    raise ValueError(f"there is no {FIRST!r}")


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options of the network that has this state_dict, as far as names and shapes tell.

    They do not tell pyramid, norm_position, pool, upsample, order and layout, nor the depths of stages after the last
    exit, for which 1 stands. Raises ValueError for a state_dict that is no SWFormer's.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"there is no {name!r}")
        shape = state[name].shape
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{name!r} has shape {tuple(shape)}")
        return shape

    first, third = "stages.0.0", "stages.2.0"
    widths = [shape(f"embeddings.{i}.weight")[0] for i in range(3)]
    blocks = {tuple(name.split(".")[1:3]) for name in state if name.startswith("stages.")}
    spatial, wavelet = shape(f"{first}.mixer.spatial.conv.weight"), shape(f"{first}.mixer.wavelet.conv.weight")
    fourier, ffn = shape(f"{first}.mixer.fourier.conv_out.weight"), shape(f"{first}.ffn.dw.0.weight")
    hidden, branches = shape(f"{third}.mixer.attention.conv1.weight")[:2]
    ups = sum(f"ups.{i}.0.weight" in state for i in range(2))
    return {
        "in_channels": shape(FIRST)[1],
        "widths": widths,
        "depths": [sum(stage == str(i) for stage, _ in blocks) or 1 for i in range(5)],
        "fusion": "concat" if "fusions.0.conv.weight" in state else "add",
        "skip": "add" if ups and "skips.0.conv.weight" not in state else "concat",
        "exit": EXITS[ups],
        "split": [_number(c, widths[0]) for c in (spatial[0], wavelet[0] / 4, fourier[0])],
        "spatial_kernel": spatial[3],
        "wavelet_kernel": wavelet[3],
        "ffn_ratio": _number(3 * ffn[0], widths[0]),
        "ffn_kernel": ffn[3],
        "reduction": branches // hidden,
    }


def preset_of(options: Mapping[str, Any]) -> str | None:
    """The preset with these widths and depths, as far as the last exit needs them."""
    stages = 3 + EXITS.index(options["exit"])
    for name, preset in PRESETS.items():
        if [*preset.widths] == [*options["widths"]] and [*preset.depths[:stages]] == [*options["depths"][:stages]]:
            return name
    return None


def find(name_or_path: str | os.PathLike[str], **hub_options: Any) -> tuple[Path, dict[str, Any] | None]:
    """The file of weights, and the options of a config.json beside it; `hub_options` are snapshot_download's.

    Raises ValueError, OSError or ImportError in a sentence that lists the names that come with the package.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in names():
        return FOLDER / f"{name_or_path}.safetensors", None
    if not path.exists():
        on_hub = isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path)
        if not on_hub or path.suffix in SUFFIXES:
            raise ValueError(
                "name_or_path must be a file, a folder, the Hub's user/repository or a name that comes with the "
                f"package, got {str(path)!r}; {_shipped()}"
            )
        path = _download(str(name_or_path), hub_options)
    if path.is_file():
        return path, None
    config, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not weights.exists():
        raise ValueError(f"{path} must hold {WEIGHTS_FILE}")
    if not config.exists():
        return weights, None
    try:
        return weights, _options(config.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} holds no options of an SWFormer: {error}") from None


def build(
    kind: type[_NETWORK], weights: Weights, exit: str | None, options: Mapping[str, Any], source: str
) -> _NETWORK:
    """A network in eval mode and fp32 with these weights; `options` go before theirs. `source`: a name for errors.

    Raises ValueError where they do not fit.
    """
    options = {**weights.options, **options}
    held = options.get("exit", EXITS[-1])
    exit = held if exit is None else exit
    check_choice("exit", exit, EXITS)
    if EXITS.index(exit) > EXITS.index(held):
        raise ValueError(f"exit must be at most {held!r}, where {source} ends, got {exit!r}")
    state = weights.state
    try:
        with torch.device("meta"):  # numbers of a damaged file may ask for any amount of memory
            expected = kind(**{**options, "exit": exit}).state_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} has options that no SWFormer has: {error}") from None
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{source} does not fit its options: there is no {name!r}")
        if state[name].shape != tensor.shape:
            shapes = tuple(tensor.shape), tuple(state[name].shape)
            raise ValueError(
                f"{source} does not fit its options: {name!r} must have shape {shapes[0]}, got {shapes[1]}"
            )
    if exit == held and len(state) > len(expected):
        more = next(name for name in state if name not in expected)
        raise ValueError(f"{source} does not fit its options: there is no place for {more!r}")
    model = kind(**{**options, "exit": exit}).float()
    model.load_state_dict({name: state[name] for name in expected})
    return model.eval()


def save(model: SWFormer, folder: str | os.PathLike[str], dtype: torch.dtype | None, metadata: dict[str, Any]) -> None:
    """Write the folder that `SWFormer.save_pretrained` describes."""
    folder = Path(folder)
    save_weights(model, folder / WEIGHTS_FILE, dtype, **metadata)
    with replacing(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(model.options, indent=2) + "\n")
    if not (folder / CARD_FILE).exists():
        with replacing(folder / CARD_FILE) as partial:
            partial.write_text(_card(model, folder, metadata), "utf-8")


def push(model: SWFormer, repo_id: str, private: bool | None, token: Any, options: dict[str, Any]) -> Any:
    """Save and upload; returns what upload_folder does."""
    hub = _package("huggingface_hub")
    repo_id = hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id
        save(model, folder, None, {})
        if hub.file_exists(repo_id, CARD_FILE, revision=options.get("revision"), token=token):
            (folder / CARD_FILE).unlink()
        return hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token, **options)


# within ---------------------------------------------------------------------------------------------------------------


class _readable:
    """Whatever else than OSError reading a file raises becomes a ValueError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.path.open("rb").close()  # safetensors says less of a file that is missing or a folder

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, (OSError, MemoryError)):
            return
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            reason = f"not safe to load, as it asks for {asked[1]}"
        else:  # what torch.load says of a broken pickle are paragraphs
            words = "" if isinstance(error, UnpicklingError) else f" ({_sentence(error)})"
            reason = f"damaged or of another kind{words}"
        raise ValueError(f"{self.path} cannot be read: it is {reason}") from None


def _sentence(error: Exception) -> str:
    """The first one of its message."""
    return re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ImportError(f'{package} is missing: pip install "sdo-swformer-fast[hub]"') from None


def _shipped() -> str:
    return f"the package comes with {', '.join(map(repr, names())) or 'none'}"


def _download(repo_id: str, options: dict[str, Any]) -> Path:
    """The folder of a repository's snapshot."""
    try:
        hub = _package("huggingface_hub")
        return Path(hub.snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **options))
    except ImportError as error:
        raise ImportError(f"{repo_id!r} is no file, and {error}; {_shipped()}") from None
    except Exception as error:  # of huggingface_hub's, httpx's and the system's many
        raise OSError(f"{repo_id!r} is no file, and not on the Hub ({_sentence(error)}); {_shipped()}") from None


def _options(text: str) -> dict[str, Any]:
    """Of JSON; ValueError for anything but an object with known exit."""
    options = json.loads(text)
    if not isinstance(options, dict):
        raise ValueError(f"config must be an object, got {text[:40]}")
    check_choice("exit", options.get("exit", EXITS[-1]), EXITS)
    return options


def _number(channels: float, dim: int) -> float:
    """channels / dim, an int where it is one."""
    ratio = channels / dim
    return int(ratio) if ratio == int(ratio) else ratio


def _card(model: SWFormer, folder: Path, metadata: dict[str, Any]) -> str:
    """The Hub's README."""
    task, preset = metadata.get("task"), preset_of(model.options)
    rows = {"preset": preset or "none", "last exit": model.exit, **metadata}
    rows["parameters"] = f"{sum(p.numel() for p in model.parameters()):,}"
    source = "/".join(folder.absolute().parts[-2:])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    title = f": {task}" if task else ""
    return CARD.format(title=title, source=source, channels=model.in_channels, table=table)
