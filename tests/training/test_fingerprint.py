"""The fingerprint of a model's weights and buffers."""

import copy

import torch
from torch import nn

from ddp_cifar.training.fingerprint import fingerprint, hash_of


def test_the_fingerprint_depends_on_every_bit_and_position_but_not_on_the_memory_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6).bfloat16())
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last)) == before
    seen = {before}
    for name, value in model.state_dict().items():
        changed = copy.deepcopy(model)
        flat = changed.state_dict()[name].view(-1)
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[flat.element_size()]
        flat.view(bits)[0] ^= 1
        seen.add(fingerprint(changed))
        if value.numel() > 1 and value.view(-1)[0] != value.view(-1)[1]:
            swapped = copy.deepcopy(model)
            flat = swapped.state_dict()[name].view(-1)
            flat[:2] = flat[:2].flip(0)
            seen.add(fingerprint(swapped))
    assert len(seen) == 1 + 9 + 4


def test_an_empty_tensor_has_a_fingerprint() -> None:
    assert hash_of(torch.zeros(0)) == 0
