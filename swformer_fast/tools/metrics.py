"""PSNR and SSIM of images (3, H, W) or (1, H, W) in [0, 1], computed in fp64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
GREY = (0.299, 0.587, 0.114)


def luma(image: Tensor) -> Tensor:
    """Y of BT.601 as Matlab's rgb2ycbcr gives it for floats, from 16 / 255 to 235 / 255; (1, H, W)."""
    weights = image.new_tensor((65.481, 128.553, 24.966)).view(3, 1, 1)
    return (16 + (weights * image).sum(0, keepdim=True)) / 255


def psnr(image: Tensor, clean: Tensor) -> float:
    """In dB, for a data range of 1; infinite for equal images."""
    error = (image.double() - clean.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def ssim(image: Tensor, clean: Tensor) -> float:
    """Mean over the places where the Gaussian window lies inside, and over channels.

    Source: Wang, Bovik, Sheikh and Simoncelli, Image quality assessment, IEEE TIP 2004; equal to scikit-image's
    structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1).
    """
    if min(image.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs sides of at least {WINDOW}, got {tuple(image.shape[-2:])}")
    x, y = image.double()[:, None], clean.double()[:, None]
    place = torch.arange(WINDOW, dtype=torch.float64, device=image.device) - WINDOW // 2
    line = torch.exp(-place.square() / (2 * SIGMA**2))
    line = line / line.sum()

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x.square() + mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    structure = (2 * covariance + C2) / (variances + C2)
    return ((2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1) * structure).mean().item()


def as_bright_as(image: Tensor, clean: Tensor) -> Tensor:
    """Scaled to the mean grey of the clean image, the convention of low-light papers that say "GT mean"."""
    grey = image.new_tensor(GREY).view(3, 1, 1)
    mean = (grey * image).sum(0).mean().clamp(min=1e-6)
    return (image * ((grey * clean).sum(0).mean() / mean)).clamp(0, 1)
