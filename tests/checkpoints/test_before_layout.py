"""A checkpoint that an older version wrote loads completely, and its run continues to the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from before_layout import ARGUMENTS
from conftest import Outcome
from helpers import config_of, make_trainer

from ddp_cifar.data import build_dataset
from ddp_cifar.distributed.world import World
from ddp_cifar.run.checkpoint_file import digest, load_checkpoint

VALUES_OF_CIFAR10 = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
PATH = Path(__file__).with_name("before_layout.pt")


def digests(state: dict[str, Any]) -> dict[str, str]:
    """The digest of each part of a checkpoint, but for the settings, and the conditions of the machine that wrote it."""
    state = state | {"progress": state["progress"] | {"conditions": {}}}
    return {part: digest(content) for part, content in state.items() if part != "config"}


def test_a_trainer_holds_all_that_the_file_says(alone: World) -> None:
    state = load_checkpoint(PATH)
    config = config_of(*ARGUMENTS)
    trainer = make_trainer(alone, config, build_dataset(config.data, alone))
    trainer.load_state_dict(state, source=str(PATH))
    found, expected = digests(trainer.state_dict()), digests(load_checkpoint(PATH))
    del expected["image_size"]  # now image_shape
    assert {part: found[part] for part in expected} == expected
    assert trainer.state_dict()["normalization"] == VALUES_OF_CIFAR10


def test_a_run_resumes_from_it_and_trains_to_its_end(train: Callable[..., Outcome], tmp_path: Path) -> None:
    done = train(*ARGUMENTS, f"run_dir={tmp_path}", f"resume={PATH}")
    assert done.status == 0, done.err
    progress = load_checkpoint(tmp_path / "checkpoints" / "latest.pt")["progress"]
    assert (progress["epoch"], progress["step"], progress["updates"]) == (3, 12, 12)
    assert (tmp_path / "status").read_text().strip() == "finished"
