"""Weights are loaded by name."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ddp_cifar.errors import UserError
from ddp_cifar.models.cnn import CNN
from ddp_cifar.models.weights import load_weights


def test_weights_for_another_number_of_classes_keep_the_models_last_layer() -> None:
    ten, three = CNN(10), CNN(3)
    before = three.state_dict()["fc_layer.6.weight"].clone()
    kept = load_weights(three, ten.state_dict(), "ten classes", new_head=True)
    assert kept == ["fc_layer.6.weight", "fc_layer.6.bias"]
    assert torch.equal(three.state_dict()["fc_layer.6.weight"], before)
    assert torch.equal(three.state_dict()["fc_layer.3.weight"], ten.state_dict()["fc_layer.3.weight"])
    assert load_weights(CNN(10), ten.state_dict(), "ten classes", new_head=True) == []


def test_a_different_shape_before_the_last_layer_is_rejected() -> None:
    with pytest.raises(UserError, match=r"fc_layer\.1\.weight has shape \(1024, 4096\), expected \(1024, 16384\)"):
        load_weights(CNN(3, 64), CNN(10, 32).state_dict(), "smaller images", new_head=True)


class Wrapped(nn.Module):
    """Its only child is called `module`, without any wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 2))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "module.module."])
@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 2)), Wrapped(), nn.DataParallel(nn.Linear(3, 2))])
def test_prefixes_of_wrappers_are_ignored_only_if_names_do_not_match(model: nn.Module, prefix: str) -> None:
    saved = {f"{prefix}{name}": torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    load_weights(model, saved, "wrapped")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"{prefix}{name}"])


def test_the_count_of_an_averaged_model_is_ignored() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    load_weights(model, AveragedModel(model).state_dict(), "averaged")
