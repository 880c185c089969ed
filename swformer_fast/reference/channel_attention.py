"""Channel attention, in plain PyTorch."""

from torch import Tensor, nn

from ..parameters import AttentionParameters
from .common import check_positive, conv2d, conv_parameters, plain, submodules


def channel_attention(x: Tensor, parameters: AttentionParameters) -> Tensor:
    """Scale each channel by its attention, with w1, b1, w2, b2 = parameters::

        x * sigmoid(conv2d(relu(conv2d(x.mean((2, 3), keepdim=True), w1, b1)), w2, b2))

    Args:
        x: (B, C, H, W).
        parameters: w1 (R, C, 1, 1), b1 (R,), w2 (C, R, 1, 1), b2 (C,); all are cast to the dtype of `x`.

    Returns:
        (B, C, H, W) in the dtype of `x`.

    Source: the channel attention in the architecture figure of arXiv 2505.05504.
    """
    w1, b1, w2, b2 = parameters
    hidden = conv2d(x.mean((2, 3), keepdim=True), w1, b1).relu()
    return x * conv2d(hidden, w2, b2).sigmoid()


class ChannelAttention(nn.Module):
    """`channel_attention` with its parameters; `max(1, dim // reduction)` hidden channels, reduction 4 by fit."""

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        dim = check_positive("dim", dim)
        hidden = max(1, dim // check_positive("reduction", reduction))
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, dim, 1)

    @property
    def readable(self) -> bool:
        """Whether `arguments` says all; else the layers are called."""
        return plain(*submodules(self, "conv1", "conv2"))

    def arguments(self) -> tuple[AttentionParameters]:
        """The arguments of `channel_attention` after `x`."""
        first, second = submodules(self, "conv1", "conv2")
        return (AttentionParameters(*conv_parameters(first), *conv_parameters(second)),)

    def forward(self, x: Tensor) -> Tensor:
        if self.readable:
            return channel_attention(x, *self.arguments())
        return x * self.conv2(self.conv1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
