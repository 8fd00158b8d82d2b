"""What a run survives, on ranks of a pool: stops anywhere, other numbers of ranks, what goes wrong inside. Real processes
that are killed are in test_faults.py.
"""

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rows, Tiny, config_of, make_trainer, random_dataset
from launched import wait_until
from ranks import RankPool
from torch import Tensor, nn

from ddp_cifar import heartbeat as heartbeat_module
from ddp_cifar.checkpoint import Checkpoints, digest, load_checkpoint
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.distributed import World
from ddp_cifar.errors import RunError, UserError
from ddp_cifar.fingerprint import fingerprint
from ddp_cifar.heartbeat import Heartbeat, Sign
from ddp_cifar.log import log
from ddp_cifar.metrics import LOSS_UNIT, Counter, Totals, ledger_numbers
from ddp_cifar.models import MODELS
from ddp_cifar.run_dir import RunDir
from ddp_cifar.stopping import Requests
from ddp_cifar.trainer import Trainer

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
STEPS = 15  # 5 an epoch of 70 images

Row = dict[str, Any]


def small_data(train: int = 70) -> DataSet:
    return random_dataset(train, test=20, val=0, image_size=8)


class AskedAt(Requests):
    """A rank that is asked to stop at a step or, with `evaluating`, in the evaluation after it."""

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


def go_on_from(state: dict[str, Any], world: World, *arguments: str) -> Trainer:
    trainer = make_trainer(world, config_of(*SMALL, *arguments), small_data())
    trainer.load_state_dict(copy.deepcopy(state), "the part before")
    return trainer


# -- stops, agreed


def stop_and_go_on(world: World, stops: list[tuple[int, bool]]) -> dict[str, Any]:
    """An unbroken run, and one that the last rank's request stops again and again."""
    unbroken = make_trainer(world, config_of(*SMALL), small_data())
    whole = Rows()
    assert unbroken.fit(whole) == ""
    trainer = make_trainer(world, config_of(*SMALL), small_data())
    parts = Rows()
    reasons = []
    for step, evaluating in stops:
        asked = AskedAt(trainer, step, evaluating) if world.rank == world.world_size - 1 else None
        reasons.append((trainer.fit(parts, asked), trainer.progress.step, trainer.progress.evaluating))
        trainer = go_on_from(trainer.state_dict(), world)
    assert trainer.fit(parts) == ""
    return {
        "reasons": reasons,
        "equal rows": parts.rows == whole.rows,
        "digests": {state_digest(unbroken), state_digest(trainer)},
        "rows": len(whole.rows),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_stop_at_any_point_changes_no_bit_and_no_row(ranks: RankPool, world_size: int) -> None:
    """In the middle of a log window, at an epoch's end, in an evaluation, and right after a start."""
    stops = [(3, False), (3, False), (9, True), (12, False)]
    results = ranks.run(stop_and_go_on, world_size, stops)
    for result in results:
        assert result["equal rows"]
        assert len(result["digests"]) == 1
        assert result["reasons"] == results[0]["reasons"], "ranks left at different steps"
        assert result["rows"] == STEPS // 2 + 3
    last = f" (rank {world_size - 1})" if world_size > 1 else ""
    # asked after step 3 and agreed at the next exchange; in the evaluation of step 10, which ends an epoch
    assert results[0]["reasons"] == [
        (f"SIGTERM{last}", 4, False),
        (f"SIGTERM{last}", 5, True),
        (f"SIGTERM{last}", 10, True),
        (f"SIGTERM{last}", 13, False),
    ]


def batches_seen(trainer: Trainer) -> dict[tuple[int, int], tuple[str, list[int]]]:
    """What `fit` will train on: (step, micro-batch) -> a digest of pixels and labels, and the sample ids."""
    seen: dict[tuple[int, int], tuple[str, list[int]]] = {}
    original = trainer.forward_backward

    def spy(micro_batch: Any, step_images: int, *, is_last: bool) -> None:
        key = (trainer.progress.step, micro_batch.index)
        assert key not in seen
        seen[key] = (digest([micro_batch.images, micro_batch.labels]), micro_batch.sample_ids.tolist())
        original(micro_batch, step_images, is_last=is_last)

    trainer.forward_backward = spy  # type: ignore[method-assign]
    return seen


def part_of_a_run(world: World, state: dict[str, Any] | None, stop_at: int | None) -> Any:
    trainer = go_on_from(state, world) if state else make_trainer(world, config_of(*SMALL), small_data())
    seen, rows = batches_seen(trainer), Rows()
    trainer.fit(rows, AskedAt(trainer, stop_at) if stop_at is not None else None)
    return seen, rows.rows, trainer.state_dict()


def test_4_2_1_and_4_ranks_see_the_batches_of_an_unbroken_run(ranks: RankPool) -> None:
    """Stopped in mid-epoch each time. Batches and pixels are equal, and each image is there once an epoch."""
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
    assert set(ledgers) == {(70, f"{int(ledger_numbers(70).sum()):016x}")}


# -- the ledger, and sums in any order


@pytest.mark.parametrize("fault", ["twice", "missing", "exchanged"])
def test_a_ledger_that_does_not_balance_ends_the_run(ranks: RankPool, fault: str) -> None:
    for message in ranks.run(cook_the_books, 2, fault):
        assert "the ledger of epoch 1 does not balance" in message
        assert "expected each of 70 once" in message
        assert "there is no checkpoint yet" in message


def cook_the_books(world: World, fault: str) -> str:
    trainer = make_trainer(world, config_of(*SMALL), small_data())
    original = trainer.counter.add

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

    trainer.counter.add = add  # type: ignore[method-assign]
    with pytest.raises(RunError) as error:
        trainer.fit()
    return str(error.value)


def test_sums_of_losses_do_not_depend_on_their_order(alone: World) -> None:
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 8 * 20
    logits, labels = torch.zeros(1000, 10), torch.zeros(1000, dtype=torch.long)
    sums = set()
    for order in (torch.arange(1000), torch.arange(999, -1, -1), losses.argsort()):
        counter = Counter(alone.device)
        for part in order.split(37):
            counter.add(losses[part], logits[part], labels[part])
        sums.add(counter.reduce(alone))
    (totals,) = sums
    assert totals.loss == pytest.approx(losses.double().sum().item(), abs=1000 * LOSS_UNIT)
    assert totals.correct == totals.images == 1000


def test_a_loss_that_is_not_finite_is_counted_as_such(alone: World) -> None:
    counter = Counter(alone.device)
    losses = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    counter.add(losses, torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    totals = counter.reduce(alone)
    assert totals.nonfinite == 2
    assert totals.loss_units * LOSS_UNIT == 3.0
    assert torch.tensor(totals.mean_loss).isnan()
    assert Totals() + totals == totals


# -- what goes wrong inside


class Faulty(Tiny):
    """With a fault at a forward pass of some rank."""

    forwards = 0
    fault: Callable[["Faulty", Tensor], Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        logits = super().forward(images)
        return self.fault(logits) if self.training and self.fault else logits


def faulty_trainer(world: World, *arguments: str, checkpoints: Checkpoints | None = None) -> Trainer:
    MODELS["faulty"] = Faulty
    config = config_of(*SMALL, "model.name=faulty", *arguments)
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
    counts = {float(state["step"]) for state in trainer.optimizer.state.values()}
    return finite, trainer.progress.step, counts


def test_a_nan_on_one_rank_ends_the_run_on_all_and_names_the_step(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(nan_on_rank_1, 2, "stop", tmp_path)
    assert first == second
    assert "the gradient of step 7 is not finite (nan), 2 of those of steps 6 to 8 are not" in first
    assert f"the last good checkpoint is {tmp_path / 'step_00000005.pt'}" in first


def test_a_nan_can_be_skipped(ranks: RankPool, tmp_path: Path) -> None:
    """The update of step 7 is left out: 14 updates in 15 steps, and neither weights nor BatchNorm's statistics take harm."""
    for finite, step, counts in ranks.run(nan_on_rank_1, 2, "skip", tmp_path):
        assert finite
        assert step == STEPS
        assert counts == {14.0}


def diverge(world: World, after_step: int) -> str:
    trainer = make_trainer(world, config_of(*SMALL, "train.fingerprint_every=4"), small_data())
    original = trainer.update

    def update(norm: Tensor) -> None:
        original(norm)
        if world.rank == 2 and trainer.progress.step == after_step:
            with torch.no_grad():
                trainer.model[10].bias[0] += 1e-6

    trainer.update = update  # type: ignore[method-assign]
    with pytest.raises(RunError) as error:
        trainer.fit()
    return str(error.value)


@pytest.mark.parametrize(("after_step", "found_by"), [(6, 9), (STEPS - 1, STEPS)])
def test_a_replica_that_diverges_is_named(ranks: RankPool, after_step: int, found_by: int) -> None:
    """By the next exchange after a fingerprint; where it was the run's last update, before the run ends."""
    for message in ranks.run(diverge, 4, after_step):
        assert f"the weights of rank 2 are not those of the other ranks, by step {found_by}" in message


def test_the_fingerprint_sees_every_bit_and_place_but_not_the_memory_order() -> None:
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


def lag(world: World) -> list[str]:
    trainer = faulty_trainer(world, "train.straggler_factor=3", "train.log_every=2")

    def fault(logits: Tensor) -> Tensor:
        if world.rank == 1:
            time.sleep(0.2)
        return logits

    trainer.model.fault = fault
    messages: list[str] = []
    watch = log.handlers[0] if log.handlers else None
    log.warning = lambda message, *_: messages.append(str(message))  # type: ignore[method-assign]
    try:
        trainer.fit()
    finally:
        del log.warning
    assert watch is None or watch in log.handlers
    return messages


def test_a_rank_that_all_wait_for_is_reported_once(ranks: RankPool) -> None:
    first, second = ranks.run(lag, 2)
    assert first == []
    assert len(second) == 1
    assert "is slow: to step 4 a step took it" in second[0]
    assert "for data" in second[0]


def test_out_of_memory_names_a_size_that_fits(alone: World) -> None:
    trainer = faulty_trainer(alone, "train.micro_batch_size=16")

    def fault(logits: Tensor) -> Tensor:
        if len(logits) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return logits

    trainer.model.fault = fault
    with pytest.raises(UserError, match=r"memory of cpu ran out at train.micro_batch_size=16: 4 would fit"):
        trainer.fit()


# -- checkpoints in the background


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller changes the state while a slow disk writes it, and does not wait."""
    import ddp_cifar.checkpoint as module

    gate = threading.Event()
    original = module.save_checkpoint

    def slow(path: Path, state: Any) -> None:
        gate.wait(10)
        original(path, state)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    weight = torch.zeros(1000)
    state = {"model": {"weight": weight}, "optimizer": {}, "progress": {"step": 1}, "config": {}}
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


def test_a_disk_that_takes_forever_costs_checkpoints_not_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ddp_cifar.checkpoint as module

    monkeypatch.setattr(log, "propagate", True)
    gate = threading.Event()
    monkeypatch.setattr(module, "save_checkpoint", lambda path, state: gate.wait(10))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({}, 1)
    checkpoints.save({}, 2)
    gate.set()
    checkpoints.finish()
    assert checkpoints.failed_saves == 1
    assert "step_00000002.pt was not saved (the one before is still being written)" in caplog.text


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
    assert steps == list(range(2, 16)), "each is due again at once, and known a step later"

    for path in checkpoints.paths():
        path.unlink()
    trainer = make_trainer(
        alone, config_of(*SMALL, "checkpoint.every_epochs=100"), small_data(), checkpoints=checkpoints
    )
    requests = Requests()
    requests._save = True
    trainer.fit(requests=requests)
    assert [int(path.stem[5:]) for path in reversed(checkpoints.paths())] == [2, 15]


# -- what a process is asked


def test_stop_and_save_files_and_the_deadline_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddp_cifar.stopping.LOOK_EVERY_S", 0.02)
    with Requests(tmp_path) as requests:
        time.sleep(0.1)
        assert (requests.reason, requests.take_save()) == ("", False)
        (tmp_path / "SAVE").touch()
        assert wait_until(lambda: not (tmp_path / "SAVE").exists(), 10)
        assert wait_until(requests.take_save, 10)
        assert not requests.take_save()
        (tmp_path / "STOP").touch()
        assert wait_until(lambda: requests.reason == "the file STOP", 10)
        assert (tmp_path / "STOP").exists(), "it stays until the run has stopped, in case it is killed before"
        requests.stopped()
        assert not (tmp_path / "STOP").exists()
    with Requests(None, deadline=(time.time() + 0.2, "train.deadline")) as requests:
        assert requests.reason == ""
        assert wait_until(lambda: requests.reason == "train.deadline", 10)


def test_the_earlier_of_deadline_and_max_hours_counts() -> None:
    from ddp_cifar.train import find_deadline

    assert find_deadline(config_of().train, 1000.0) is None
    assert find_deadline(config_of("train.max_hours=0.5").train, 1000.0) == (2800.0, "train.max_hours")
    assert find_deadline(config_of("train.max_hours=0.5", "train.deadline=2000").train, 1000.0) == (
        2000.0,
        "train.deadline",
    )


# -- signs of life


def test_a_hang_names_the_silent_or_the_one_behind(alone: World, tmp_path: Path) -> None:
    signs = {rank: Sign(rank, f"host{rank}", 100 + rank, ticks=5, beats=7, step=7, time=0.0) for rank in range(3)}
    world = World(0, 0, 3, 3, alone.device, "gloo", alone.side)
    describe = Heartbeat(tmp_path, tmp_path, world, timeout_s=30)._describe
    alive = {rank: Sign(**{**vars(sign), "ticks": 9}) for rank, sign in signs.items()}
    silent = {**alive, 1: signs[1]}
    assert "rank 1 (host1, pid 101, at step 7) is silent" in describe(signs, silent)
    assert "rank 2 (never seen) is silent" in describe(signs, {rank: alive[rank] for rank in (0, 1)})
    behind = {**alive, 2: Sign(**{**vars(alive[2]), "beats": 6, "step": 6})}
    assert "rank 2 (host2, pid 102, at step 6) is behind the others" in describe(signs, behind)
    assert "all ranks are alive and wait" in describe(signs, alive)


def test_a_hang_ends_the_process_within_its_time_and_a_slow_peer_does_not(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    gone = threading.Event()

    def leave(message: str) -> None:
        left.append(message)
        gone.set()

    monkeypatch.setattr(heartbeat_module, "leave", leave)
    started = time.monotonic()
    with Heartbeat(tmp_path, tmp_path, alone, timeout_s=2) as beating, beating.watching():
        while time.monotonic() - started < 2.5:  # longer than the limit, but it moves
            beating.beat(1)
            time.sleep(0.05)
        assert left == []
        started = time.monotonic()
        assert gone.wait(4)
        assert 1 < time.monotonic() - started <= 2
    assert "no rank has moved for 2 s (train.hang_timeout_s=2)" in left[0]
    stacks = (tmp_path / "rank_0.stacks").read_text()
    assert "test_survival.py" in stacks, "the main thread's stack, which waits in this test"


def test_starts_are_counted_and_what_they_lost(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    first = run_dir.note_start(1000.0, step=0, world_size=4, last_seen=None)
    assert (first.restarts, first.steps_lost, first.occupied_s) == (0, 0, 0.0)
    second = run_dir.note_start(1500.0, step=20, world_size=2, last_seen=(1100.0, 25))
    assert (second.restarts, second.steps_lost, second.occupied_s) == (1, 5, 100.0)
    with open(run_dir.starts, "a") as file:
        file.write('{"time": 16')  # what a crash leaves
    third = run_dir.note_start(2000.0, step=30, world_size=2, last_seen=(1700.0, 33))
    assert (third.restarts, third.steps_lost, third.occupied_s) == (2, 8, 300.0)
