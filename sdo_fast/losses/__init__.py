"""Losses on images for `sdo_fast.optimize_latents`, and rewards: CLIP, aesthetic and preference models.

Images are (B, 3, H, W) in [0, 1] everywhere, as `PipelineSampler.decode` and pipelines with output_type="pt" give them.
A loss is an `nn.Module`: `loss(images)` is a scalar to be minimised, `loss.score(images)` (B,) the higher the better:

    clip = sdo_fast.losses.ClipEncoder("openai/clip-vit-base-patch32").to("cuda", torch.float16)
    loss = sdo_fast.losses.ClipTextSimilarity(clip, "a photo of a smiling face")
    optimize_latents(sampler, latents, lambda x0: loss(sampler.decode(x0)))

Losses add, and take augmented copies: `0.5 * loss(augment(images.repeat(20, 1, 1, 1)))`. Their models are frozen.
Images and model may differ in dtype and device: the result has the images' device and dtype, but float32 at least.
`import sdo_fast.losses` loads no transformers; the losses do (`pip install 'sdo-swformer-fast[losses]'`).
"""

from .augment import Cutouts, DiffAugment
from .clip import ClipEncoder, ClipGramStyle, ClipTextSimilarity, Reward
from .rewards import AestheticScore, HPSv2, IQAMetric, PickScore

__all__ = [
    "AestheticScore",
    "ClipEncoder",
    "ClipGramStyle",
    "ClipTextSimilarity",
    "Cutouts",
    "DiffAugment",
    "HPSv2",
    "IQAMetric",
    "PickScore",
    "Reward",
]
