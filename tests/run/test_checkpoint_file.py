"""A checkpoint file: written atomically, verified when read."""

from pathlib import Path

import pytest
import torch
from helpers import state_of

from ddp_cifar.errors import UserError
from ddp_cifar.run.checkpoint_file import digest, load_checkpoint, save_checkpoint, snapshot


def test_a_checkpoint_is_a_plain_dict_and_loads_bitwise_identical(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.pt"
    save_checkpoint(path, state_of())
    assert digest(load_checkpoint(path)) == digest(state_of())
    assert set(torch.load(path, weights_only=True)) == {"model", "optimizer", "progress", "config", "digest"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_digest_depends_on_every_bit_key_and_type_but_not_on_the_memory_order() -> None:
    weight = torch.randn(2, 3, 4, 4)
    assert digest(weight) == digest(weight.to(memory_format=torch.channels_last))
    flipped = weight.clone()
    flipped.view(-1).view(torch.int32)[7] ^= 1
    others = [
        flipped,
        weight.double(),
        weight.view(2, 3, 16),
        {"a": weight},
        [weight],
        {"b": weight},
        1,
        1.0,
        "1",
        None,
    ]
    assert len({digest(weight), *map(digest, others)}) == len(others) + 1


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_on_a_gpu_a_snapshot_is_a_copy_in_pinned_memory_only_if_asked_for(pinned: bool) -> None:
    weight = torch.ones(1000, device="cuda")
    copied, wait = snapshot({"model": [weight]}, pinned=pinned)
    weight.zero_()
    wait()
    assert torch.equal(copied["model"][0], torch.ones(1000))
    assert copied["model"][0].is_pinned() == pinned


def test_a_pickle_that_could_run_code_is_rejected(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="could run code on loading"):
        load_checkpoint(tmp_path / "bad.pt")
