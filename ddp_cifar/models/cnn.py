"""The network of the original script: six convolutions and three linear layers.

Parameters have the same names as in the original script (`conv_layer.0.weight` ... `fc_layer.6.bias`), so that a state dict
saved by it can be loaded here.
"""

from torch import Tensor, nn


class CNN(nn.Module):
    """(B, C, H, W) float images -> (B, num_classes) logits; 5,852,170 parameters for ten classes and 32 x 32 color images.

    The first linear layer has 256 x (H // 8) x (W // 8) inputs. H and W must be at least 8.
    """

    def __init__(self, num_classes: int = 10, image_size: int | tuple[int, int] = 32, *, num_channels: int = 3) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.conv_layer = nn.Sequential(
            *_block(num_channels, 32, 64),  # -> (B, 64, 16, 16) from 32 x 32
            *_block(64, 128, 128),  # -> (B, 128, 8, 8)
            nn.Dropout2d(p=0.05),
            *_block(128, 256, 256),  # -> (B, 256, 4, 4)
        )
        self.fc_layer = nn.Sequential(
            nn.Dropout(p=0.1),
            nn.Linear(256 * (height // 8) * (width // 8), 1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(p=0.1),
            nn.Linear(512, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv_layer(images)
        logits: Tensor = self.fc_layer(features.flatten(1))
        return logits


def _block(channels_in: int, channels_mid: int, channels_out: int) -> list[nn.Module]:
    """Two convolutions, the first with BatchNorm, and a max pooling that halves height and width."""
    return [
        nn.Conv2d(channels_in, channels_mid, kernel_size=3, padding=1),
        nn.BatchNorm2d(channels_mid),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_mid, channels_out, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=2, stride=2),
    ]
