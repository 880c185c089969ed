"""Align a diffusion model to a reward: python -m sdo_fast.train CONFIG.toml

    prompts = "prompts.txt"                 # a prompt a line, or a list of them

    [source]
    pipeline = "stabilityai/sdxl-turbo"     # folder or name for from_pretrained; or factory = "module:function"
    dtype = "bfloat16"                      # this and further keys: arguments of from_pretrained

    [call]                                  # arguments of the pipeline's call
    num_inference_steps = 4
    guidance_scale = 0.0

    [rewards]                               # functions (images, prompts) -> (B,), by name
    aesthetic = "my_rewards:aesthetic"

    [trainer]                               # options of sdo_fast.RewardConfig
    steps = 300
    output = "out"
    path = { recipe = "flowbp_sparse", steps = 4 }

Paths are relative to the working folder. `accelerate launch -m sdo_fast.train CONFIG.toml` and `torchrun` run it on
many processes. Every option of the trainer is a flag as well, which overrides the file: --learning-rate 1e-4.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from . import paths
from .training import PipelineSource, RewardConfig, RewardTrainer

TABLES = ("prompts", "source", "call", "rewards", "trainer")


def read_toml(text: str) -> dict[str, Any]:
    # Python 3.10 has no tomllib.
    return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text)


def named(name: str, dotted: Any) -> Any:
    """What "module:function" names."""
    module, _, attribute = str(dotted).partition(":")
    if not (module and attribute):
        raise ValueError(f"{name} must be 'module:function', got {dotted!r}")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} must name something to import, got {dotted!r}: {error}") from error
    if not callable(found):
        raise TypeError(f"{name} must name a function, got {dotted!r}, a {type(found).__name__}")
    return found


def as_path(value: Any) -> Any:
    """A gradient path: a name, an index, indices, or a table with a recipe of `sdo_fast.paths` and its settings."""
    if not isinstance(value, Mapping):
        return value
    settings = dict(value)
    recipe = settings.pop("recipe", None)
    if recipe not in paths.__all__ or recipe in ("Path", "Recipe"):
        raise ValueError(f"path must have a recipe of sdo_fast.paths, got {recipe!r}")
    return getattr(paths, recipe)(**settings)


def make_source(table: Mapping[str, Any], call: Mapping[str, Any]) -> Any:
    options = dict(table)
    factory, pipeline = options.pop("factory", None), options.pop("pipeline", None)
    if (factory is None) == (pipeline is None):
        raise ValueError("source must have either a pipeline or a factory")
    if factory is not None:
        made = named("source.factory", factory)(**options)
        return PipelineSource(made, **call) if call else made
    from diffusers import DiffusionPipeline

    for key in options.keys() & {"dtype", "torch_dtype"}:
        dtype = getattr(torch, str(options[key]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"source.{key} must be the name of a torch.dtype, as 'bfloat16', got {options[key]!r}")
        options[key] = dtype
    return PipelineSource(DiffusionPipeline.from_pretrained(pipeline, **options), **call)


def make_trainer(config: Mapping[str, Any], flags: Mapping[str, Any]) -> RewardTrainer:
    """What the file says, and options of the trainer beside it."""
    if unknown := config.keys() - set(TABLES):
        raise ValueError(f"config must have {', '.join(TABLES)}, got {sorted(unknown)}")
    if missing := [name for name in ("prompts", "source", "rewards") if name not in config]:
        raise ValueError(f"config must have {', '.join(missing)}")
    for name in ("source", "call", "rewards", "trainer"):
        if not isinstance(config.get(name, {}), Mapping):
            raise TypeError(f"{name} must be a table, got {config[name]!r}")
    options = {**config.get("trainer", {}), **flags}
    known = {option.name for option in fields(RewardConfig)}
    if unknown := options.keys() - known:
        raise ValueError(f"trainer must have options of RewardConfig, got {sorted(unknown)}")
    if "path" in options:
        options["path"] = as_path(options["path"])
    settings = RewardConfig(**options)
    rewards = {name: named(f"rewards.{name}", dotted) for name, dotted in config["rewards"].items()}
    source = make_source(config["source"], config.get("call", {}))
    return RewardTrainer(source, rewards, config["prompts"], settings)


def value_of(text: str) -> Any:
    """As in TOML, or else the text itself."""
    try:
        return read_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m sdo_fast.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be trained and its price, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    group = parser.add_argument_group("options of RewardConfig, over those of the file")
    for option in fields(RewardConfig):
        group.add_argument(f"--{option.name.replace('_', '-')}", type=value_of, metavar="VALUE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    sys.path.insert(0, os.getcwd())  # rewards beside the config, under torchrun too
    given = {option.name: getattr(args, option.name) for option in fields(RewardConfig)}
    trainer = None
    try:
        config = read_toml(args.config.read_text(encoding="utf-8-sig"))
        trainer = make_trainer(config, {name: value for name, value in given.items() if value is not None})
        if args.dry_run:
            trainer.accelerator.print(trainer.plan())
            return 0
        done = trainer.train(args.resume)
    except (OSError, TypeError, ValueError) as error:
        if trainer is not None and trainer.records.begun:
            raise  # the traceback tells which reward or model
        print(f"{args.config}: {error}", file=sys.stderr)
        return 2
    if not done:
        trainer.accelerator.print("interrupted; the same command with --resume goes on from there")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
