"""Channel attention, in plain PyTorch."""

from torch import Tensor, nn

from .common import check_positive, conv2d, conv_parameters


def channel_attention(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Scale each channel by its attention::

        x * sigmoid(conv2d(relu(conv2d(x.mean((2, 3), keepdim=True), w1, b1)), w2, b2))

    Args:
        x: (B, C, H, W).
        w1: (R, C, 1, 1); all parameters are cast to the dtype of `x`.
        b1: (R,).
        w2: (C, R, 1, 1).
        b2: (C,).

    Returns:
        (B, C, H, W) in the dtype of `x`.

    Source: the channel attention in the architecture figure of arXiv 2505.05504.
    """
    hidden = conv2d(x.mean((2, 3), keepdim=True), w1, b1).relu()
    return x * conv2d(hidden, w2, b2).sigmoid()


class ChannelAttention(nn.Module):
    """`channel_attention` with its parameters; `max(1, dim // reduction)` hidden channels, reduction 4 by fit."""

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("reduction", reduction)
        hidden = max(1, dim // reduction)
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, dim, 1)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `channel_attention` after `x`."""
        return (*conv_parameters(self.conv1), *conv_parameters(self.conv2))

    def forward(self, x: Tensor) -> Tensor:
        return channel_attention(x, *self.arguments())
