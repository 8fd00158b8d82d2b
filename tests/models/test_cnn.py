"""The network of the original script."""

import torch
from torch import nn

from ddp_cifar.models.cnn import CNN
from ddp_cifar.models.weights import load_weights

# fmt: off
ORIGINAL_CONV = nn.Sequential(
    nn.Conv2d(in_channels=3, out_channels=32, kernel_size=3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
    nn.Conv2d(in_channels=32, out_channels=64, kernel_size=3, padding=1), nn.ReLU(inplace=True),
    nn.MaxPool2d(kernel_size=2, stride=2),
    nn.Conv2d(in_channels=64, out_channels=128, kernel_size=3, padding=1), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
    nn.Conv2d(in_channels=128, out_channels=128, kernel_size=3, padding=1), nn.ReLU(inplace=True),
    nn.MaxPool2d(kernel_size=2, stride=2), nn.Dropout2d(p=0.05),
    nn.Conv2d(in_channels=128, out_channels=256, kernel_size=3, padding=1), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
    nn.Conv2d(in_channels=256, out_channels=256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
    nn.MaxPool2d(kernel_size=2, stride=2),
)


ORIGINAL_FC = nn.Sequential(
    nn.Dropout(p=0.1), nn.Linear(4096, 1024), nn.ReLU(inplace=True), nn.Linear(1024, 512), nn.ReLU(inplace=True),
    nn.Dropout(p=0.1), nn.Linear(512, 10),
)


class OriginalCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_layer, self.fc_layer = ORIGINAL_CONV, ORIGINAL_FC

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_layer(x)
        return self.fc_layer(x.view(x.size(0), -1))


def test_the_cnn_has_the_layers_names_and_parameters_of_the_original_script() -> None:
    ours, original = CNN(), OriginalCNN()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 5_852_170
    assert repr(ours.conv_layer) == repr(original.conv_layer)
    assert repr(ours.fc_layer) == repr(original.fc_layer)
    assert list(ours.state_dict()) == list(original.state_dict())


def test_a_state_dict_of_the_original_script_loads_with_and_without_data_parallel() -> None:
    original = OriginalCNN().eval()
    images = torch.randn(2, 3, 32, 32)
    for saved in (original.state_dict(), nn.DataParallel(original).state_dict()):
        ours = CNN().eval()
        load_weights(ours, saved, "the original's")
        assert torch.equal(ours(images), original(images))


def test_the_last_layer_has_one_output_per_class() -> None:
    assert CNN(3)(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_the_first_linear_layer_fits_the_image_size() -> None:
    for size in (8, 20, 36, 64):
        assert CNN(3, size)(torch.randn(2, 3, size, size)).shape == (2, 3)
