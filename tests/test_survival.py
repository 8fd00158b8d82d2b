"""Fault tolerance on a pool of ranks: stops at any point, changed numbers of ranks, failures inside a run.

test_faults.py tests it with real processes that are killed.
"""

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rows, Tiny, config_of, make_trainer, random_dataset, state_of
from ranks import RankPool
from torch import Tensor

from ddp_cifar.data.dataset import DataSet
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import FaultyReplica, RunError, UserError
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import digest, load_checkpoint
from ddp_cifar.run.checkpoint_store import Checkpoints, NullCheckpoints
from ddp_cifar.run.heartbeat import Heartbeat, NullHeartbeat
from ddp_cifar.run.resume import find_checkpoint
from ddp_cifar.run.stopping import Requests
from ddp_cifar.training.metrics import TrainMetrics
from ddp_cifar.training.totals import sample_hashes
from ddp_cifar.training.trainer import Trainer

SMALL = (
    "model.name=tiny",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "train.epochs=3",
    "train.log_every=2",
    "train.agree_every=1",
    "eval.batch_size=3",
    "precision=fp32",
)


STEPS = 15  # 5 per epoch of 70 images


Row = dict[str, Any]


def small_data(train: int = 70) -> DataSet:
    return random_dataset(train, test=20, val=0, image_size=8)


class StopAt(Requests):
    """Requests a stop at a step or, with `evaluating`, during the evaluation after it."""

    def __init__(self, trainer: Trainer, step: int, evaluating: bool = False) -> None:
        self.trainer, self.at, self.evaluating = trainer, step, evaluating
        super().__init__()

    @property  # type: ignore[override]
    def reason(self) -> str:
        progress = self.trainer.progress
        return "SIGTERM" if progress.step >= self.at and (progress.evaluating or not self.evaluating) else ""

    @reason.setter
    def reason(self, value: str) -> None:
        pass


def state_digest(trainer: Trainer) -> str:
    state = trainer.state_dict()
    return digest({name: state[name] for name in ("model", "optimizer", "progress")})


def resume_from(state: dict[str, Any], world: World, *arguments: str) -> Trainer:
    trainer = make_trainer(world, config_of(*SMALL, *arguments), small_data())
    trainer.load_state_dict(copy.deepcopy(state), "the previous part")
    return trainer


def stop_and_resume(world: World, stops: list[tuple[int, bool]]) -> dict[str, Any]:
    """Compare an uninterrupted run with one that the last rank stops several times."""
    uninterrupted = make_trainer(world, config_of(*SMALL), small_data())
    whole = Rows()
    assert uninterrupted.fit(whole) == ""
    trainer = make_trainer(world, config_of(*SMALL), small_data())
    parts = Rows()
    reasons = []
    for step, evaluating in stops:
        requests = StopAt(trainer, step, evaluating) if world.rank == world.world_size - 1 else None
        reasons.append((trainer.fit(parts, requests), trainer.progress.step, trainer.progress.evaluating))
        trainer = resume_from(trainer.state_dict(), world)
    assert trainer.fit(parts) == ""
    return {
        "reasons": reasons,
        "equal rows": parts.rows == whole.rows,
        "digests": {state_digest(uninterrupted), state_digest(trainer)},
        "rows": len(whole.rows),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_stop_at_any_point_leaves_state_and_rows_bitwise_identical(ranks: RankPool, world_size: int) -> None:
    """Stops between two rows, at the end of an epoch, during an evaluation, and right after a start."""
    stops = [(3, False), (3, False), (9, True), (12, False)]
    results = ranks.run(stop_and_resume, world_size, stops)
    for result in results:
        assert result["equal rows"]
        assert len(result["digests"]) == 1
        assert result["reasons"] == results[0]["reasons"], "ranks stopped at different steps"
        assert result["rows"] == STEPS // 2 + 3
    last = f" (rank {world_size - 1})" if world_size > 1 else ""
    # requested after step 3 and decided at the next exchange; during the evaluation of step 10, the end of an epoch
    assert results[0]["reasons"] == [
        (f"SIGTERM{last}", 4, False),
        (f"SIGTERM{last}", 5, True),
        (f"SIGTERM{last}", 10, True),
        (f"SIGTERM{last}", 13, False),
    ]


def batches_seen(trainer: Trainer) -> dict[tuple[int, int], tuple[str, list[int]]]:
    """Record the batches of `fit`: (step, micro-batch) -> a digest of pixels and labels, and the sample ids."""
    seen: dict[tuple[int, int], tuple[str, list[int]]] = {}
    original = trainer.train_step.forward_backward

    def spy(micro_batch: Any, *others: Any, is_last: bool) -> None:
        key = (trainer.progress.step, micro_batch.index)
        assert key not in seen
        seen[key] = (digest([micro_batch.images, micro_batch.labels]), micro_batch.sample_ids.tolist())
        original(micro_batch, *others, is_last=is_last)

    trainer.train_step.forward_backward = spy  # type: ignore[method-assign]
    return seen


def part_of_a_run(world: World, state: dict[str, Any] | None, stop_at: int | None) -> Any:
    trainer = resume_from(state, world) if state else make_trainer(world, config_of(*SMALL), small_data())
    seen, rows = batches_seen(trainer), Rows()
    trainer.fit(rows, StopAt(trainer, stop_at) if stop_at is not None else None)
    return seen, rows.rows, trainer.state_dict()


def test_4_2_1_and_4_ranks_see_the_batches_of_an_uninterrupted_run(ranks: RankPool) -> None:
    """Each stop is during an epoch. Batches and pixels are equal, and each image occurs once per epoch."""
    whole = {key: value for seen, *_ in ranks.run(part_of_a_run, 2, None, None) for key, value in seen.items()}
    state: dict[str, Any] | None = None
    parts: dict[tuple[int, int], tuple[str, list[int]]] = {}
    ledgers = []
    for world_size, stop_at in ((4, 2), (2, 6), (1, 10), (4, None)):
        results = ranks.run(part_of_a_run, world_size, state, stop_at)
        for seen, *_ in results:
            assert not parts.keys() & seen.keys(), "a micro-batch was computed twice"
            parts |= seen
        _, rows, state = results[0]
        ledgers += [(row["ledger/images"], row["ledger/sum"]) for row in rows if "train/epoch" in row]
    assert parts == whole
    for epoch in range(3):
        ids = [i for (step, _), (_, ids) in parts.items() if step // 5 == epoch for i in ids]
        assert sorted(ids) == list(range(70))
    assert len(ledgers) == 3
    assert set(ledgers) == {(70, f"{int(sample_hashes(70).sum()):016x}")}


@pytest.mark.parametrize("fault", ["twice", "missing", "exchanged"])
def test_a_wrong_sample_ledger_ends_the_run(ranks: RankPool, fault: str) -> None:
    for message in ranks.run(corrupt_the_ledger, 2, fault):
        assert "the sample ledger of epoch 1 is wrong" in message
        assert "expected each of 70 images once" in message
        assert "no checkpoint exists yet" in message


def corrupt_the_ledger(world: World, fault: str) -> str:
    trainer = make_trainer(world, config_of(*SMALL), small_data())
    original = trainer.metrics.counter.add

    def add(losses: Tensor, logits: Tensor, labels: Tensor, sample_ids: Tensor) -> None:
        if world.rank == 1 and trainer.progress.step == 3:
            if fault == "twice":
                original(losses, logits, labels, sample_ids)
            elif fault == "missing":
                losses, logits, labels, sample_ids = losses[1:], logits[1:], labels[1:], sample_ids[1:]
            else:
                sample_ids = sample_ids.clone()
                sample_ids[0] = (sample_ids[0] + 1) % 70
        original(losses, logits, labels, sample_ids)

    trainer.metrics.counter.add = add  # type: ignore[method-assign]
    with pytest.raises(RunError) as error:
        trainer.fit()
    return str(error.value)


class Faulty(Tiny):
    """A model with a fault in the forward pass."""

    forwards = 0
    fault: Callable[["Faulty", Tensor], Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        logits = super().forward(images)
        return self.fault(logits) if self.training and self.fault else logits


def faulty_trainer(world: World, *arguments: str, checkpoints: Checkpoints | None = None) -> Trainer:
    config = config_of(*SMALL, "model.name=test_survival:Faulty", *arguments)
    return make_trainer(world, config, small_data(), checkpoints=checkpoints)


def nan_on_rank_1(world: World, mode: str, folder: Path) -> Any:
    saves = world.is_main and mode == "stop"
    checkpoints = Checkpoints(folder, keep=2) if saves else None
    arguments = (f"train.on_nonfinite={mode}", "checkpoint.every_steps=4", "train.log_every=4")
    trainer = faulty_trainer(world, *arguments, checkpoints=checkpoints)

    def fault(logits: Tensor) -> Tensor:
        return logits * float("nan") if world.rank == 1 and trainer.progress.step == 6 else logits

    trainer.model.fault = fault
    if mode == "stop":
        with pytest.raises(RunError) as error:
            trainer.fit()
        return str(error.value)
    trainer.fit()
    finite = all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())
    counts = {float(state["step"]) for state in trainer.train_step.optimizer.state.values()}
    return finite, trainer.progress.step, counts


def test_a_nan_on_one_rank_ends_the_run_on_all_ranks_and_names_the_step(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(nan_on_rank_1, 2, "stop", tmp_path)
    assert first == second
    assert "the gradient of step 7 is not finite (nan): " in first
    assert re.search(
        r"(\d+) of \1 values of the output of the model \(Faulty\) are not finite, although its input is", first
    )
    assert re.search(r"in micro-batch \d on rank 1; the last good checkpoint is", first)
    assert f"the last good checkpoint is {tmp_path / 'step_00000005.pt'}" in first


def test_a_nan_can_be_skipped(ranks: RankPool, tmp_path: Path) -> None:
    """The update of step 7 is skipped: 14 updates in 15 steps. Weights and BatchNorm statistics stay finite."""
    for finite, step, counts in ranks.run(nan_on_rank_1, 2, "skip", tmp_path):
        assert finite
        assert step == STEPS
        assert counts == {14.0}


def diverge(world: World, after_step: int) -> str:
    trainer = make_trainer(world, config_of(*SMALL, "train.fingerprint_every=4"), small_data())
    original = trainer.train_step.update

    def update(norm: Tensor, metrics: TrainMetrics) -> bool:
        original(norm, metrics)
        if world.rank == 2 and trainer.progress.step == after_step:
            with torch.no_grad():
                trainer.model[10].bias[0] += 1e-6
        return True

    trainer.train_step.update = update  # type: ignore[method-assign]
    with pytest.raises(RunError) as error:
        trainer.fit()
    assert isinstance(error.value, FaultyReplica) == (world.rank == 2)
    return str(error.value)


@pytest.mark.parametrize(("after_step", "found_by"), [(6, 9), (STEPS - 1, STEPS)])
def test_a_replica_that_diverges_is_named(ranks: RankPool, after_step: int, found_by: int) -> None:
    """At the next exchange after a fingerprint; after the last update of the run, before the run ends."""
    for message in ranks.run(diverge, 4, after_step):
        assert f"the weights of rank 2 differ from those of the other ranks, found at step {found_by}" in message


def lag(world: World, slow_rank: int | None, where: str, steps: range, *arguments: str) -> list[str]:
    """Return the warnings of a run in which a rank (None: each) is late by 0.2 s in the given part of the given steps."""
    trainer = faulty_trainer(world, "train.log_every=1", *arguments)
    train_step = trainer.train_step

    def wait() -> None:
        if slow_rank in (None, world.rank) and trainer.progress.step in steps:
            time.sleep(0.2)

    def late(original: Callable[..., Any]) -> Callable[..., Any]:
        def then_wait(*given: Any, **options: Any) -> Any:
            result = original(*given, **options)
            wait()
            return result

        return then_wait

    def late_items(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def items(*given: Any) -> Iterator[Any]:
            for item in original(*given):
                wait()
                yield item

        return items

    if where == "forward":
        trainer.model.fault = late(lambda logits: logits)
    elif where == "data":
        trainer.train_loader.steps = late_items(trainer.train_loader.steps)  # type: ignore[method-assign]
    elif where == "update":
        train_step._update = late(train_step._update)  # type: ignore[method-assign]
    elif where == "link":
        original = train_step.start_reducing
        train_step.start_reducing = lambda metrics: late(original(metrics))  # type: ignore[method-assign]
    elif where == "between steps":
        trainer.log_row = late(trainer.log_row)  # type: ignore[method-assign]
    elif where == "evaluation":
        trainer.evaluator.run = late(trainer.evaluator.run)  # type: ignore[method-assign]
    messages: list[str] = []
    watch = log.handlers[0] if log.handlers else None
    log.warning = lambda message, *_: messages.append(str(message))  # type: ignore[method-assign]
    try:
        trainer.fit()
    finally:
        del log.warning
    assert watch is None or watch in log.handlers
    return messages


INSENSITIVE = "train.straggler_factor=8"
"""Steps of a few milliseconds vary with the machine's load, which may also make a slow period a few steps longer."""


@pytest.mark.parametrize(
    ("where", "what"), [("data", "data loading"), ("forward", "forward pass"), ("update", "update")]
)
def test_a_straggler_says_what_is_slow_and_when_it_is_over(ranks: RankPool, where: str, what: str) -> None:
    first, second = ranks.run(lag, 2, 1, where, range(6, 10), INSENSITIVE)
    assert first == []
    begin, end = second
    assert f"is slow since step 6 and delays all ranks: its {what} takes" in begin
    assert "this rank before" in begin
    assert re.search(r"this rank is (no longer )?slow: from step 6 to 1\d it delayed all ranks by about", end)


def test_a_rank_that_is_slow_at_the_end_of_the_run_is_reported(ranks: RankPool) -> None:
    """Also if the exchange with its last rows comes after the last step."""
    first, second = ranks.run(lag, 2, 1, "data", range(STEPS), INSENSITIVE, "train.agree_every=4")
    assert first == []
    assert "the run ends while this rank is slow: from step " in second[1]
    assert f" to {STEPS} it delayed all ranks" in second[1]


def test_a_slow_link_is_reported_by_rank_0(ranks: RankPool) -> None:
    (begin, end), second = ranks.run(lag, 2, None, "link", range(6, 10), INSENSITIVE)
    assert "the exchange between ranks (or the backward pass) is slow on all ranks since step 6" in begin
    assert re.search(r"the exchange between ranks is (no longer )?slow: from step 6 to 1\d it delayed all ranks", end)
    assert second == []


@pytest.mark.parametrize(("rank", "where"), [(0, "between steps"), (1, "evaluation")])
def test_what_is_not_in_a_step_does_not_make_a_rank_slow(ranks: RankPool, rank: int, where: str) -> None:
    assert ranks.run(lag, 2, rank, where, range(5, STEPS + 1), INSENSITIVE) == [[], []]


def test_a_rank_with_one_more_micro_batch_is_not_a_straggler(ranks: RankPool) -> None:
    arguments = ("train.straggler_factor=1.5", "train.max_steps=8", "train.log_every=2")
    assert ranks.run(lag, 3, None, "forward", range(STEPS), *arguments) == [[]] * 3


def test_out_of_memory_names_a_size_that_fits(alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = faulty_trainer(alone, "train.micro_batch_size=16")

    def fault(logits: Tensor) -> Tensor:
        if len(logits) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return logits

    trainer.model.fault = fault
    monkeypatch.setattr("ddp_cifar.training.warmup.write_snapshot", lambda world, logs: f"; see {logs}")
    expected = "cpu ran out of memory with 16 images per micro-batch; use train.micro_batch_size=5"
    with (
        Heartbeat(tmp_path, tmp_path / "logs", alone, 100, 100) as heartbeat,
        pytest.raises(UserError, match=re.escape(f"{expected}; see {tmp_path}/logs")),
    ):
        trainer.fit(heartbeat=heartbeat)


def test_a_checkpoint_has_the_state_at_the_time_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller does not wait, and changes the state while a slow disk writes it."""
    from ddp_cifar.run import checkpoint_store as module

    gate = threading.Event()
    original = module.save_checkpoint

    def slow(path: Path, state: Any) -> None:
        gate.wait(10)
        original(path, state)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    weight = torch.zeros(1000)
    state = {
        "model": {"weight": weight},
        "optimizer": {},
        "progress": {"step": 1, "epoch": 0, "step_in_epoch": 1, "results": {}},
        "config": {},
    }
    expected = digest(state)
    checkpoints = Checkpoints(tmp_path, keep=1)
    started = time.monotonic()
    checkpoints.save(state, 1)
    weight += 1
    state["progress"]["step"] = 2
    assert time.monotonic() - started < 5
    gate.set()
    checkpoints.finish()
    assert digest(load_checkpoint(tmp_path / "step_00000001.pt")) == expected


def test_a_blocked_disk_skips_checkpoints_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ddp_cifar.run import checkpoint_store as module

    monkeypatch.setattr(log, "propagate", True)
    gate = threading.Event()
    monkeypatch.setattr(module, "save_checkpoint", lambda path, state: gate.wait(10))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({}, 1)
    checkpoints.save({}, 2)
    gate.set()
    checkpoints.finish()
    assert checkpoints.failed_saves == 1
    assert "step_00000002.pt was not saved (the previous one is still being written)" in caplog.text


def test_the_last_checkpoint_waits_for_a_slow_disk(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddp_cifar.run import checkpoint_store as module

    original = module.save_checkpoint

    def slow(path: Path, state: Any) -> None:
        time.sleep(1)
        original(path, state)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    monkeypatch.setattr("ddp_cifar.training.trainer.SAVE_TIMEOUT_S", 0.01)
    checkpoints = Checkpoints(tmp_path, keep=9)
    trainer = make_trainer(alone, config_of(*SMALL, "checkpoint.every_steps=1"), small_data(), checkpoints=checkpoints)
    trainer.fit()
    assert (checkpoints.failed_saves > 0, checkpoints.paths()[0].name) == (True, f"step_{trainer.last_step:08d}.pt")


def test_checkpoints_by_steps_minutes_and_the_file_save(alone: World, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=100)
    arguments = ("checkpoint.every_epochs=100", "checkpoint.every_steps=6")
    trainer = make_trainer(alone, config_of(*SMALL, *arguments), small_data(), checkpoints=checkpoints)
    trainer.fit(rows := Rows())
    assert [int(path.stem[5:]) for path in reversed(checkpoints.paths())] == rows.synced == [6, 12, 15]

    for path in checkpoints.paths():
        path.unlink()
    arguments = ("checkpoint.every_epochs=100", "checkpoint.every_minutes=1e-9")
    trainer = make_trainer(alone, config_of(*SMALL, *arguments), small_data(), checkpoints=checkpoints)
    trainer.fit()
    steps = [int(path.stem[5:]) for path in reversed(checkpoints.paths())]
    assert steps == list(range(2, 16)), "the next one is due immediately, and decided a step later"

    for path in checkpoints.paths():
        path.unlink()
    trainer = make_trainer(
        alone, config_of(*SMALL, "checkpoint.every_epochs=100"), small_data(), checkpoints=checkpoints
    )
    requests = Requests()
    requests._save = True
    trainer.fit(requests=requests)
    assert [int(path.stem[5:]) for path in reversed(checkpoints.paths())] == [2, 15]


class Lost(Exception):
    """The error of a collective whose peer is lost."""


def lose_a_peer(trainer: Trainer) -> None:
    """Save as another thread does it, while the main thread is here; then fail."""
    thread = threading.Thread(target=trainer.survivor.save)
    thread.start()
    thread.join()
    raise Lost


@pytest.mark.parametrize("moment", ["forward", "before the update", "after the update", "evaluation"])
def test_a_survivor_saves_the_last_completed_step(alone: World, tmp_path: Path, moment: str) -> None:
    """Resumed from it, state and rows are bitwise identical to those of an uninterrupted run."""
    arguments = ("train.ema_decay=0.9", "checkpoint.every_epochs=100", "checkpoint.every_minutes=null")
    uninterrupted = make_trainer(alone, config_of(*SMALL, *arguments), small_data())
    uninterrupted.fit(whole := Rows())
    checkpoints = Checkpoints(tmp_path, keep=9)
    trainer = faulty_trainer(alone, *arguments, checkpoints=checkpoints)
    step, train_step = trainer.progress, trainer.train_step

    def fault(logits: Tensor) -> Tensor:
        if moment == "forward" and step.step == 7 and trainer.model.forwards % 4 == 2:  # in the third micro-batch
            lose_a_peer(trainer)
        return logits

    def lose_at(owner: Any, name: str, at: Callable[[], bool]) -> None:
        original = getattr(owner, name)

        def then_lose(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if at():
                lose_a_peer(trainer)
            return result

        setattr(owner, name, then_lose)

    trainer.model.fault = fault
    if moment == "before the update":
        lose_at(train_step, "gradients", lambda: step.step == 7)
    elif moment == "after the update":
        lose_at(trainer.profiler, "step", lambda: step.step == 7)
    elif moment == "evaluation":
        lose_at(trainer, "sync_ranks", lambda: step.step == 10 and step.evaluating)
    with pytest.raises(Lost):
        trainer.fit(parts := Rows())
    saved = checkpoints.load_latest()
    assert saved is not None
    assert saved.state["progress"]["step"] == (10 if moment == "evaluation" else 7)
    assert saved.state["rows"][-1]["step"] == (10 if moment == "evaluation" else 6)
    elsewhere = find_checkpoint(str(saved.path), Checkpoints(tmp_path / "other", keep=1))
    assert elsewhere is not None
    assert "rows" not in elsewhere.state, "another run does not get this run's rows"
    resumed = resume_from({key: value for key, value in saved.state.items() if key != "config"}, alone, *arguments)
    resumed.fit(parts)
    assert state_digest(resumed) == state_digest(uninterrupted)
    assert digest(resumed.state_dict()["ema"]) == digest(uninterrupted.state_dict()["ema"])
    assert parts.rows == whole.rows


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("half an update", "an update failed"),
        ("not finite", "a number is not finite"),
        ("wrong", None),
    ],
)
def test_a_survivor_saves_nothing_that_is_wrong(
    alone: World, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str | None
) -> None:
    """A `RunError` ends the run because the state is wrong. A gradient that is not finite is found only at the next row."""
    monkeypatch.setattr(log, "propagate", True)
    checkpoints = Checkpoints(tmp_path, keep=9)
    trainer = faulty_trainer(alone, "checkpoint.every_epochs=100", "train.log_every=5", checkpoints=checkpoints)
    step = trainer.progress
    original = trainer.train_step._update

    def update(norm: Tensor) -> None:
        original(norm)
        if step.step == 7 and fault != "not finite":
            raise Lost if fault == "half an update" else RunError("the weights of rank 1 differ")

    def forward(logits: Tensor) -> Tensor:
        if step.step == 7 and fault == "not finite":
            lose_a_peer(trainer)
        return logits * float("nan") if step.step == 6 and fault == "not finite" else logits

    trainer.train_step.norm_check.reads = False  # as on one GPU, where it would have to wait
    monkeypatch.setattr(trainer.train_step, "_update", update)
    trainer.model.fault = forward
    with pytest.raises((Lost, RunError)):
        trainer.fit()
    assert checkpoints.paths() == []
    assert reason is None or f"the last completed step was not saved: {reason}" in caplog.text


def test_survivors_that_differ_save_nothing(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    """Equal ones save once, whichever comes first. States of two steps are both kept."""
    monkeypatch.setattr(log, "propagate", True)
    checkpoints = Checkpoints(tmp_path, keep=9)
    other = NullCheckpoints(checkpoints)
    state = state_of()
    checkpoints.save_as_survivor(state, 3, 0)
    written = checkpoints.paths()[0].stat().st_mtime_ns
    other.save_as_survivor(state | {"rows": []}, 3, 0)
    assert checkpoints.paths()[0].stat().st_mtime_ns == written
    other.save_as_survivor(state, 4, 0)
    assert [path.name for path in checkpoints.paths()] == ["step_00000004.pt", "step_00000003.pt"]
    other.save_as_survivor(state_of(2.0), 4, 0)
    checkpoints.save_as_survivor(state, 4, 0)
    assert [path.name for path in checkpoints.paths()] == ["step_00000003.pt"]
    assert "step_00000004.pt was removed: the ranks that are left have different states" in caplog.text


def test_threads_that_end_the_process_wait_for_the_save_of_the_main_thread(alone: World, monkeypatch: Any) -> None:
    """torchrun may exit, or a peer be found dead, while the main thread saves because of an exception."""
    survivor, requests = faulty_trainer(alone).survivor, Requests()
    called: list[object] = []
    monkeypatch.setattr(survivor, "save", lambda: called.append(requests._before_leaving))
    with pytest.raises(Lost), survivor.on_guard(NullHeartbeat(), requests):
        raise Lost
    assert called == [survivor.save]


@pytest.mark.parametrize("later_first", [True, False])
def test_of_survivors_before_and_after_the_end_of_an_epoch_the_later_counts(tmp_path: Path, later_first: bool) -> None:
    """Both are states after the same step."""
    checkpoints = Checkpoints(tmp_path, keep=9)
    states = [(state_of(1.0), 0), (state_of(2.0), 1)]
    for state, epoch in reversed(states) if later_first else states:
        checkpoints.save_as_survivor(state, 4, epoch)
    (path,) = checkpoints.paths()
    assert digest(load_checkpoint(path)) == digest(state_of(2.0))
