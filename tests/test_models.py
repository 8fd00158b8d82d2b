"""The article's network."""

import pytest
import torch
from torch import nn

from ddp_cifar.checkpoint import load_weights
from ddp_cifar.errors import UserError
from ddp_cifar.models.cnn import CNN

# fmt: off
ARTICLE_CONV = nn.Sequential(
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
ARTICLE_FC = nn.Sequential(
    nn.Dropout(p=0.1), nn.Linear(4096, 1024), nn.ReLU(inplace=True), nn.Linear(1024, 512), nn.ReLU(inplace=True),
    nn.Dropout(p=0.1), nn.Linear(512, 10),
)
# fmt: on


class ArticleCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_layer, self.fc_layer = ARTICLE_CONV, ARTICLE_FC

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_layer(x)
        return self.fc_layer(x.view(x.size(0), -1))


def test_it_has_the_articles_layers_names_and_parameters() -> None:
    ours, article = CNN(), ArticleCNN()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 5_852_170
    assert repr(ours.conv_layer) == repr(article.conv_layer)
    assert repr(ours.fc_layer) == repr(article.fc_layer)
    assert list(ours.state_dict()) == list(article.state_dict())


def test_a_state_dict_of_the_articles_module_loads_with_and_without_data_parallel() -> None:
    article = ArticleCNN().eval()
    images = torch.randn(2, 3, 32, 32)
    for saved in (article.state_dict(), nn.DataParallel(article).state_dict()):
        ours = CNN().eval()
        load_weights(ours, saved, "the article's")
        assert torch.equal(ours(images), article(images))


def test_the_last_layer_follows_the_number_of_classes() -> None:
    assert CNN(3)(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_the_first_linear_layer_follows_the_image_size() -> None:
    for size in (8, 20, 36, 64):
        assert CNN(3, size)(torch.randn(2, 3, size, size)).shape == (2, 3)


def test_weights_for_other_classes_leave_a_new_last_layer() -> None:
    ten, three = CNN(10), CNN(3)
    before = three.state_dict()["fc_layer.6.weight"].clone()
    kept = load_weights(three, ten.state_dict(), "ten classes", new_head=True)
    assert kept == ["fc_layer.6.weight", "fc_layer.6.bias"]
    assert torch.equal(three.state_dict()["fc_layer.6.weight"], before)
    assert torch.equal(three.state_dict()["fc_layer.3.weight"], ten.state_dict()["fc_layer.3.weight"])
    assert load_weights(CNN(10), ten.state_dict(), "ten classes", new_head=True) == []


def test_a_layer_before_the_last_of_another_shape_is_refused_all_the_same() -> None:
    with pytest.raises(UserError, match=r"fc_layer\.1\.weight has shape \(1024, 4096\), expected \(1024, 16384\)"):
        load_weights(CNN(3, 64), CNN(10, 32).state_dict(), "smaller images", new_head=True)
