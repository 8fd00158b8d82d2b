"""The progress of a run: step counts, and its state in a checkpoint."""

import pytest
from helpers import config_of

from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.training.progress import Progress
from ddp_cifar.training.totals import Totals


def test_the_last_step_of_an_epoch_starts_its_evaluation() -> None:
    progress = Progress(epoch=1, step=10)
    found = []
    for _ in range(3):
        progress.advance(end_of_epoch=3)
        found.append((progress.step, progress.step_in_epoch, progress.evaluating))
    assert found == [(11, 1, False), (12, 2, False), (13, 3, True)]
    assert progress.state_dict()["evaluating"] is True
    config = config_of("train.epochs=2", "train.max_steps=13")
    assert not progress.is_finished(config), "its evaluation is not done"
    progress.end_epoch(is_whole=True)
    assert progress.is_finished(config)


def test_a_run_ends_early_if_the_last_evaluation_is_patience_epochs_after_the_best_one() -> None:
    """With five steps per epoch."""

    def ends(epoch: int, best_step: int | None, *arguments: str, step_in_epoch: int = 0) -> bool:
        progress = Progress(epoch=epoch, step=5 * epoch + step_in_epoch, best_step=best_step)
        progress.step_in_epoch = step_in_epoch
        config = config_of("data.val_images=10", "train.patience_epochs=3", *arguments)
        assert progress.is_finished(config) == progress.ends_early(config)
        return progress.ends_early(config)

    assert [ends(epoch, 10) for epoch in (2, 3, 4, 5, 6)] == [False, False, False, True, True]
    assert not ends(5, 10, step_in_epoch=2)
    assert not ends(5, None), "resumed from the checkpoint of another run, and not yet evaluated"
    assert not ends(5, 10, "train.patience_epochs=null")
    assert [ends(epoch, 10, "eval.every=2") for epoch in (5, 6)] == [False, True], "epoch 5 has no evaluation"
    assert [ends(epoch, 12) for epoch in (5, 6)] == [False, True], "the best evaluation was at train.max_steps"


def test_a_checkpoint_contains_every_field() -> None:
    progress = Progress(
        2, 3, 13, True, Totals(1, 2, 3), Totals(4, 5, 6), {"test/accuracy": 0.5}, 0.25, 9, 12, "x", {"a": "b"}
    )
    again = Progress()
    again.load_state_dict(progress.state_dict())
    assert again == progress


def test_fields_that_an_older_checkpoint_lacks_keep_their_values() -> None:
    progress = Progress(data="shapes")
    progress.load_state_dict({"step": 7, "epoch": 1, "train": {"images": 5}})
    assert progress == Progress(data="shapes", step=7, epoch=1, updates=7, train=Totals(images=5))


@pytest.mark.parametrize("state", [{"step": 7, "phase": "train"}, {"step": 7, "train": {"pictures": 5}}])
def test_an_unknown_field_is_rejected(state: dict[str, object]) -> None:
    progress = Progress(step=3)
    with pytest.raises(UserError, match=r"written by another version of ddp_cifar \(.*(phase|pictures)"):
        progress.load_state_dict(state)
    assert progress == Progress(step=3)
    assert not hasattr(progress, "phase")


def test_a_resume_warns_about_changed_conditions_and_ignores_those_that_one_side_lacks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    before = Progress(conditions={"precision": "bf16", "torch": "2.11", "an older name": "7"})
    now = Progress(conditions={"precision": "fp32", "torch": "2.11", "CPU threads per rank": "2"})
    now.resume(before.state_dict(), "step_7.pt")
    assert {record.getMessage() for record in caplog.records} == {
        "precision was bf16 in step_7.pt and is now fp32: results will differ"
    }
    assert set(now.conditions) == {"precision", "torch", "CPU threads per rank"}
