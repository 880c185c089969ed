"""Which parameters are trained, the model they began from, and the files that diffusers loads them from."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import RewardConfig
from .sources import Source

ADAPTER = "default"
HALF = (torch.float16, torch.bfloat16)


class Tuning:
    """The networks of a source with the parameters that a config names to be trained, and all others frozen.

    LoRA's are float32, whatever the network is.

    Raises:
        ValueError: nothing is to be trained, or parameters that are float16 or bfloat16 themselves.
    """

    def __init__(self, source: Source, config: RewardConfig) -> None:
        for module in source.modules():
            module.requires_grad_(False).eval()
        self.config, self.lora = config, config.train == "lora"
        if self.lora:
            for name, network in source.networks.items():
                _add_lora(name, network, config)
        else:
            _thaw(source.networks, config.train)
        self.networks = {
            name: network
            for name, network in source.networks.items()
            if any(p.requires_grad for p in network.parameters())
        }
        if config.gradient_checkpointing:
            for name, network in self.networks.items():
                if not hasattr(network, "enable_gradient_checkpointing"):
                    raise ValueError(
                        f"gradient_checkpointing must be False for {name}, a {type(network).__name__}, which has none"
                    )
                cast(Any, network).enable_gradient_checkpointing()
        # Only what is trained differs from the base, so only that is copied.
        self.bases = {} if self.lora or not config.kl_weight else {n: _frozen_copy(m) for n, m in self.networks.items()}

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained."""
        return {
            f"{name}.{key}": p
            for name, network in self.networks.items()
            for key, p in network.named_parameters()
            if p.requires_grad
        }

    def base_call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What network `name` gave before training."""
        if name in self.bases:
            return self.bases[name](*args, **kwargs)
        with _without_lora(self.networks[name]):
            return self.networks[name](*args, **kwargs)

    def save(self, folder: Path, pipe: Any, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes LoRA as `pipe.load_lora_weights(folder)` reads it, or whole networks as `from_pretrained` does.

        LoRA of a network that the pipeline saves none of lies in a folder of the network's name: as
        `pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)` reads it, or, of another name
        or without a pipeline, as `network.load_lora_adapter(folder / name, prefix=None, use_safetensors=True)` does.

        Args:
            pipe: whose `save_lora_weights` is used, or None.
            states: each network's state dict.
        """
        if self.lora:
            self._save_lora(folder, pipe, states)
            return
        for name, network in self.networks.items():
            if hasattr(network, "save_pretrained"):
                with _holding(network, states[name]) as whole:
                    whole.save_pretrained(folder / name)
            else:
                (folder / name).mkdir(parents=True)
                tensors = {key: t.contiguous() for key, t in states[name].items()}
                save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")

    def _save_lora(self, folder: Path, pipe: Any, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        taken = inspect.signature(pipe.save_lora_weights).parameters if hasattr(pipe, "save_lora_weights") else {}
        of_pipe: dict[Path, dict[str, Any]] = {}
        for name, network in self.networks.items():
            state = get_peft_model_state_dict(network, dict(states[name]), adapter_name=ADAPTER)
            layers = {key: t.contiguous() for key, t in state.items()}
            adapter = cast(Any, network).peft_config[ADAPTER].to_dict()  # alpha and rank
            # A second denoiser has a file of its own, under the names of the first.
            known = name if f"{name}_lora_layers" in taken else name.removesuffix("_2")
            if f"{known}_lora_layers" not in taken:
                LoraBaseMixin.write_lora_layers(layers, str(folder / name), True, None, None, True, adapter)
                continue
            arguments = of_pipe.setdefault(folder if known == name else folder / name, {})
            arguments[f"{known}_lora_layers"] = layers
            if f"{known}_lora_adapter_metadata" in taken:
                arguments[f"{known}_lora_adapter_metadata"] = adapter
        for place, arguments in of_pipe.items():
            pipe.save_lora_weights(place, **arguments)


def _add_lora(name: str, network: nn.Module, config: RewardConfig) -> None:
    targets = config.lora_targets
    if present := getattr(network, "peft_config", None):
        raise ValueError(
            f"source must have no LoRA yet for train='lora', which would put it out of use, got {name} with "
            f"{', '.join(map(repr, present))}: pipe.fuse_lora() and pipe.unload_lora_weights() add it to the weights"
        )
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_rank if config.lora_alpha is None else config.lora_alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if hasattr(network, "add_adapter"):
            cast(Any, network).add_adapter(adapter, ADAPTER)
        else:
            inject_adapter_in_model(adapter, network, ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def _thaw(networks: Mapping[str, nn.Module], train: str | Sequence[str]) -> None:
    patterns = ["*"] if train == "all" else [train] if isinstance(train, str) else list(train)
    named = {f"{name}.{key}": p for name, network in networks.items() for key, p in network.named_parameters()}
    for pattern in patterns:
        found = [p for key, p in named.items() if fnmatchcase(key, pattern)]
        if not found:
            raise ValueError(
                f"train must be 'lora', 'all' or patterns of parameter names like {next(iter(named))!r}, got "
                f"{pattern!r}, which matches none"
            )
        for p in found:
            if p.dtype in HALF:
                raise ValueError(
                    f"train must be 'lora' for a pipeline in {p.dtype}, got {train!r}: load it in float32, with "
                    "mixed_precision='bf16' for speed"
                )
            p.requires_grad_()


def _frozen_copy(network: nn.Module) -> nn.Module:
    """What is frozen anyway is shared."""
    shared = {id(p): p for p in network.parameters() if not p.requires_grad}
    return copy.deepcopy(network, shared).requires_grad_(False)


@contextmanager
def _without_lora(network: nn.Module) -> Iterator[None]:
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def _holding(network: Any, state: Mapping[str, Tensor]) -> Iterator[Any]:
    """The network, or where its weights are sharded a whole one, with this state."""
    if all(type(p) is nn.Parameter for p in network.parameters()):
        yield network
        return
    with torch.device("meta"):
        whole = type(network).from_config(network.config)
    whole.load_state_dict(dict(state), assign=True)
    yield whole
