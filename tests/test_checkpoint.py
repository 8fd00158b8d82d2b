"""Checkpoints: written whole, verified, the newest good one found, old ones removed. Refusals are in test_mistakes.py."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_cifar.checkpoint import Checkpoints, digest, find_checkpoint, load_checkpoint, save_checkpoint
from ddp_cifar.errors import UserError


def state_of(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((1000,), value)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "progress": {"step": 3, "results": {"test/accuracy": 0.5}},
        "config": {"seed": 0, "clip": None},
    }


def test_a_checkpoint_is_a_plain_dict_that_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.pt"
    save_checkpoint(path, state_of())
    assert digest(load_checkpoint(path)) == digest(state_of())
    assert set(torch.load(path, weights_only=True)) == {"model", "optimizer", "progress", "config", "digest"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_digest_sees_every_bit_key_and_type_but_not_the_memory_order() -> None:
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


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddp_cifar.log import log

    monkeypatch.setattr(log, "propagate", True)
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(state_of(float(step)), step)
        checkpoints.finish()
    newest = tmp_path / "step_00000002.pt"
    content = bytearray(newest.read_bytes())
    if damage == "one bit flipped":
        content[content.index(b"\x00\x00\x00\x40" * 8) + 11] ^= 1  # in the weights, which are all 2.0
    newest.write_bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(damage)])
    found = checkpoints.load_latest()
    assert found is not None
    assert found.path.name == "step_00000001.pt"
    assert "step_00000002.pt" in caplog.text


def test_the_newest_and_the_best_are_kept_and_linked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(state_of(float(step)), step, best_step=2 if step >= 2 else None)
        checkpoints.finish()
    assert [path.name for path in checkpoints.paths()] == [f"step_{step:08d}.pt" for step in (5, 4, 2)]
    assert os.readlink(tmp_path / "latest.pt") == "step_00000005.pt"
    assert os.readlink(tmp_path / "best.pt") == "step_00000002.pt"


def test_what_must_be_there_first_is_called_before_the_checkpoint_is_there(tmp_path: Path) -> None:
    seen: list[bool] = []
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 1, first=lambda: seen.append((tmp_path / "step_00000001.pt").exists()))
    checkpoints.finish()
    assert seen == [False]
    assert (tmp_path / "step_00000001.pt").exists()


def test_links_that_a_kill_prevented_are_set_by_the_next_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        state = state_of()
        state["progress"]["best_step"] = step
        checkpoints.save(state, step, best_step=step)
        checkpoints.finish()
        if step == 1:  # as a kill between the second one's rename and its links would leave it
            kept = (tmp_path / "step_00000001.pt").read_bytes()
    (tmp_path / "step_00000001.pt").write_bytes(kept)
    for link in ("latest.pt", "best.pt"):
        (tmp_path / link).unlink()
        (tmp_path / link).symlink_to("step_00000001.pt")
    find_checkpoint("auto", Checkpoints(tmp_path, keep=1))
    assert os.readlink(tmp_path / "latest.pt") == os.readlink(tmp_path / "best.pt") == "step_00000002.pt"


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 60)
    checkpoints.finish()
    (tmp_path / "step_00000100.pt").write_bytes(b"half of it")
    found = checkpoints.load_latest()
    assert found is not None
    assert found.path.name == "step_00000060.pt"
    checkpoints.save(state_of(), 80)
    checkpoints.finish()
    assert [path.name for path in checkpoints.paths()] == ["step_00000100.pt", "step_00000080.pt"]


def test_without_a_best_there_is_no_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state_of(), 1)
    checkpoints.finish()
    assert not (tmp_path / "best.pt").exists()


def test_a_full_disk_costs_a_warning_and_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 1)
    checkpoints.finish()
    before = (tmp_path / "step_00000001.pt").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    checkpoints.save(state_of(2.0), 2)
    checkpoints.finish()
    assert checkpoints.failed_saves == 1
    assert [path.name for path in checkpoints.paths()] == ["step_00000001.pt"]
    assert (tmp_path / "step_00000001.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_write_killed_half_way_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    """What a kill leaves is a temporary file, which no one takes for a checkpoint, and which the next save replaces."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(), 1)
    checkpoints.finish()
    (tmp_path / "step_00000002.pt.tmp").write_bytes(b"half of it")
    found = checkpoints.load_latest()
    assert found is not None
    assert found.path.name == "step_00000001.pt"


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="could run code on loading"):
        load_checkpoint(tmp_path / "bad.pt")
