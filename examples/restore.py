"""Restore a photograph with a small SWFormer.

    python examples/restore.py rainy.jpg --task rain_streaks
    python examples/restore.py clean.png --task haze --degrade 3

The second line degrades the picture first, so that it can be compared with the truth. Writes the result and a picture
of before and after. Weights for rain streaks, haze and low light come with the examples; `train_restore.py` makes those
of the other tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from degradations import DEGRADATIONS, degrade
from matplotlib.figure import Figure
from PIL import Image, ImageCms, ImageOps
from runs import OUTPUT, write_atomically
from safetensors import SafetensorError
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

import swformer_fast as sf

ASSETS = Path(__file__).resolve().parent / "assets"
PRESET = "tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights_file(task: str) -> str:
    return f"restore_{task}.safetensors"


def load_model(path: Path) -> sf.SWFormer:
    """The network with the weights that `train_restore.py` wrote, or a .pth of its state_dict, in eval mode.

    Raises ValueError for a file of something else.
    """
    model = sf.SWFormer.from_preset(PRESET)
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except (SafetensorError, UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} holds no weights of the preset {PRESET!r}: {reason}") from error
    return model.eval().requires_grad_(False)


def read_image(path: Path) -> Tensor:
    """(3, H, W) in [0, 1] from any file that Pillow reads, upright and in sRGB; grey becomes RGB, no transparency.

    Raises ValueError for numbers that are no picture's: integers outside 16 bits, floats outside [0, 1].
    """
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode == "F" or picture.mode.startswith("I"):  # which Pillow would clip to 8 bits
            pixels, white = np.asarray(picture, dtype=np.float32), 1 if picture.mode == "F" else 65535
            if pixels.min() < 0 or pixels.max() > white:
                raise ValueError(f"{path} must have pixels from 0 to {white}, got {pixels.min():g} to {pixels.max():g}")
            pixels = pixels[..., None].repeat(3, axis=2) / white
        else:
            pixels = np.asarray(in_srgb(picture), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def in_srgb(picture: Image.Image) -> Image.Image:
    """As RGB, in which the networks were trained; by the picture's own profile if it has one."""
    profile = picture.info.get("icc_profile")
    if profile and picture.mode in ("RGB", "L", "CMYK"):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile
            of_picture = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(picture, of_picture, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return picture.convert("RGB")


def write_image(image: Tensor, path: Path) -> None:
    """Rounded to 8 bits, in the format of the path's suffix."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    write_atomically(path, lambda partial: Image.fromarray(pixels).save(partial))


def quality(image: Tensor, clean: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of an image (3, H, W), clipped to [0, 1]; SSIM with the Gaussian window of its paper."""
    a, b = (t.clamp(0, 1).permute(1, 2, 0).double().numpy() for t in (clean, image))
    ssim = structural_similarity(
        a, b, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return peak_signal_noise_ratio(a, b, data_range=1), ssim


def draw(images: dict[str, Tensor], clean: Tensor | None, path: Path) -> None:
    """The images side by side, with their PSNR where the truth is known."""
    height, width = next(iter(images.values())).shape[1:]
    figure = Figure(figsize=(5 * len(images), 5 * height / width + 0.4), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
        axes.set_title(title if clean is None or image is clean else f"{title}, {quality(image, clean)[0]:.2f} dB")
        axes.set_axis_off()
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="picture to restore (PNG, JPEG, whatever Pillow reads)")
    parser.add_argument("--task", choices=DEGRADATIONS, required=True, help="what is wrong with it")
    parser.add_argument("--weights", type=Path, help="safetensors file (that of the task in examples/assets)")
    parser.add_argument(
        "--exit", choices=sf.EXITS, default="large", help="of the network: less is faster (%(default)s)"
    )
    parser.add_argument("--tile", type=int, default=512, help="side of the tiles of larger pictures (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="what the network computes in (%(default)s)")
    truth = parser.add_mutually_exclusive_group()
    truth.add_argument("--clean", type=Path, help="the picture as it should be: prints PSNR and SSIM")
    truth.add_argument("--degrade", type=int, metavar="SEED", help="the picture is clean: degrade it with this seed")
    parser.add_argument("--out", type=Path, help="restored picture to write (examples/output/IMAGE_TASK.png)")
    args = parser.parse_args(argv)

    weights = args.weights or ASSETS / weights_file(args.task)
    if not weights.exists():
        parser.error(f"no weights in {weights}: python examples/train_restore.py --task {args.task} makes them")
    out = args.out or OUTPUT / f"{args.image.stem}_{args.task}.png"
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        parser.error(f"--out {out} has no suffix of a picture that Pillow writes")
    try:
        before, clean = read_image(args.image), args.clean and read_image(args.clean)
        model = load_model(weights).to(DTYPES[args.dtype])
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        parser.error(f"cannot read the input: {error}")
    if clean is not None and clean.shape != before.shape:
        parser.error(f"--clean has shape {tuple(clean.shape)}, the image {tuple(before.shape)}")
    if args.degrade is not None:
        before, clean = degrade(before, args.task, args.degrade), before

    try:
        after = sf.restore_tiled(model, before, args.tile, min(32, args.tile // 4), args.exit).clamp(0, 1)
    except ValueError as error:
        parser.error(str(error))
    comparison = out.with_name(f"{out.stem}_comparison.png")
    images = {"before": before, "after": after, **({} if clean is None else {"clean": clean})}
    write_image(after, out)
    draw(images, clean, comparison)
    if clean is not None:
        for name in ("before", "after"):
            psnr, ssim = quality(images[name], clean)
            print(f"{name}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}")
    print(f"wrote {out} and {comparison}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
