"""SWFormer for spandrel, by which ComfyUI and chaiNNer load models: `install()` makes them know its files.

For ComfyUI a file in custom_nodes will do::

    import swformer_fast.spandrel

    swformer_fast.spandrel.install(exit="medium")
    NODE_CLASS_MAPPINGS = {}
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from . import pretrained
from .network import SWFormer
from .reference.common import check_choice
from .reference.network import EXITS, MULTIPLE

if TYPE_CHECKING:
    from spandrel import ArchRegistry

ID = "SWFormer"


def install(exit: str | None = None, registry: ArchRegistry | None = None) -> None:
    """Let spandrel know SWFormer; call it again to load files with another exit.

    spandrel gives an architecture tensors alone, so options are inferred from them: a network with another pyramid than
    "haar" is not told from one with it.

    Args:
        exit: the last exit to build of each file; None: all that it holds. A file that ends before it is refused.
        registry: None: spandrel's MAIN_REGISTRY, which its hosts use.

    Raises:
        ValueError: exit is none of `EXITS`.
        ImportError: spandrel is missing.
    """
    from spandrel import MAIN_REGISTRY, ArchSupport

    if exit is not None:
        check_choice("exit", exit, EXITS)
    registry = MAIN_REGISTRY if registry is None else registry
    support = registry.get(ID)
    if support is None:
        registry.add(ArchSupport.from_architecture(_architecture()(exit)))
    else:
        support.architecture.exit = exit


def detect(state_dict: dict[str, Any]) -> bool:
    """Whether it is an SWFormer's."""
    try:
        pretrained.infer_options(pretrained.unwrapped(state_dict))
    except ValueError:
        return False
    return True


@cache
def _architecture() -> Any:
    """The class of spandrel's Architecture, made here so that importing this module needs no spandrel."""
    from spandrel import Architecture, ImageModelDescriptor, SizeRequirements

    class SWFormerArch(Architecture[SWFormer]):
        def __init__(self, exit: str | None) -> None:
            super().__init__(id=ID, detect=detect)
            self.exit = exit

        def load(self, state_dict: dict[str, Any]) -> ImageModelDescriptor[SWFormer]:
            state = pretrained.unwrapped(state_dict)
            weights = pretrained.Weights(state, pretrained.infer_options(state), {})
            model = pretrained.build(SWFormer, weights, self.exit, {}, "the file")
            preset = pretrained.preset_of(model.options)
            return ImageModelDescriptor(
                model,
                {name: state[name] for name in model.state_dict()},
                architecture=self,
                purpose="Restoration",
                tags=[*([preset] if preset else []), model.exit],
                supports_half=True,
                supports_bfloat16=True,
                scale=1,
                input_channels=model.in_channels,
                output_channels=model.in_channels,
                size_requirements=SizeRequirements(minimum=MULTIPLE),
            )

    return SWFormerArch
