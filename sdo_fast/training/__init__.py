"""Aligning a diffusion model to a reward, on one machine or many: `RewardTrainer` on accelerate and peft.

    source = sdo_fast.PipelineSource(pipe, num_inference_steps=20)
    sdo_fast.RewardTrainer(source, reward, "prompts.txt", sdo_fast.RewardConfig(output="out")).train()

`python -m sdo_fast.train CONFIG.toml` does the same from a file. What these modules need beside torch is the extra
`train`; `import sdo_fast` loads none of it.
"""

try:
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import safetensors  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"RewardTrainer needs {error.name}, which is not installed: pip install 'sdo-swformer-fast[train]'"
    ) from error

from .config import RewardConfig
from .sources import PipelineSource, SamplerSource, Source
from .trainer import RewardTrainer

__all__ = ["PipelineSource", "RewardConfig", "RewardTrainer", "SamplerSource", "Source"]
