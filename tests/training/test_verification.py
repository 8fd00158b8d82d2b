"""Flipped bits are found, and the rank that has computed them is named."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Rows, config_of, make_trainer, random_dataset
from ranks import RankPool
from torch import Tensor, nn

from ddp_cifar.distributed.world import World
from ddp_cifar.errors import FaultyReplica, NoRestart, RunError
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_store import Checkpoints, NullCheckpoints
from ddp_cifar.tracking.base import Scalars
from ddp_cifar.training.progress import Failed
from ddp_cifar.training.trainer import Trainer
from ddp_cifar.training.verdict import Digest, judge, judge_states

SMALL = ("model.name=tiny", "train.micro_batch_size=4", "train.epochs=1", "device=cpu", "train.verify_every=1")


def trainer_of(world: World, *arguments: str, images: int = 48, **options: Any) -> Trainer:
    return make_trainer(world, config_of(*SMALL, *arguments), random_dataset(images, image_size=8), **options)


def flip(tensor: Tensor, chance: random.Random) -> None:
    """Flip a random bit of a random element, in place."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.view(kinds[tensor.element_size()])
    bit = chance.randrange(8 * tensor.element_size())
    mask = 1 << bit if bit < 8 * tensor.element_size() - 1 or tensor.element_size() == 1 else -(1 << bit)
    bits[tuple(chance.randrange(size) for size in tensor.shape)] ^= mask


class Fault:
    """A fault of this rank's device, in one place, as long as it is active. The verifier does not know of it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.passes_left = 0
        self.seed = 0
        for parameter in trainer.model.parameters():
            parameter.register_hook(lambda gradient, parameter=parameter: self.spoil_gradient(parameter, gradient))
        for module in trainer.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self.spoil_buffer)
        self.kind = ""

    def spoil_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        chance = random.Random(self.seed)
        parameters = list(self.trainer.model.parameters())
        if self.kind != "gradient" or not self.passes_left or parameter is not chance.choice(parameters):
            return None
        self.passes_left -= 1
        spoiled = gradient.clone(memory_format=torch.contiguous_format)
        flip(spoiled, chance)
        return spoiled

    def spoil_buffer(self, module: nn.Module, _: object, output: object) -> None:
        if self.kind == "buffer" and self.passes_left and module.training:
            self.passes_left -= 1
            flip(module.running_mean.data, random.Random(self.seed))  # type: ignore[union-attr]

    @contextlib.contextmanager
    def active(self, kind: str, seed: int, passes: int) -> Iterator[None]:
        """The fault is active in the next passes of the body."""
        chance, model = random.Random(seed), self.trainer.model
        self.kind, self.seed, self.passes_left = kind, seed, passes
        targets = {
            "weights": lambda: chance.choice(list(model.parameters())).data,
            "optimizer": lambda: chance.choice(
                [state["exp_avg"] for state in self.trainer.train_step.optimizer.state.values()]
            ),
            "images": lambda: self.images(chance),
        }
        if kind in targets:
            target = targets[kind]()
            before = target.clone()
            flip(target, random.Random(seed))
        yield
        if kind in targets:
            target.copy_(before)
        self.kind = ""

    def images(self, chance: random.Random) -> Tensor:
        """The middle of one of the images in the next step."""
        (batch,) = next(self.trainer.train_loader.steps(0)).indices.micro_batches
        image = int(batch.indices[chance.randrange(len(batch.indices))])
        return self.trainer.train_loader.split.images[image, 0, 3, 3:5]


def check_once(trainer: Trainer) -> Failed | None:
    """Compute the gradients of the first step, and check them, without an update."""
    batch = next(trainer.train_loader.steps(0))
    trainer.train_step.buffers.undo_step()  # of the call before, as there was no update
    try:
        with trainer.verifier.checking(trainer.progress):
            trainer.train_step.gradients(batch, trainer.progress.step, trainer.metrics)
    except Failed as failed:
        return failed
    return None


def plant(
    world: World, kind: str, trials: int, passes: int, arguments: tuple[str, ...] = ()
) -> list[tuple[int, list[int], str]]:
    """Plant faults on random ranks; return for each one its rank, the ranks that are named, and the message."""
    sizes = ("augment.crop_padding=0", f"train.global_batch_size={4 * world.world_size}")
    trainer = trainer_of(world, *sizes, *arguments)
    for batch in [next(trainer.train_loader.steps(0))]:  # so that the optimizer has a state
        trainer.train_step.update(trainer.train_step.gradients(batch, 0, trainer.metrics), trainer.metrics)
    fault = Fault(trainer)
    assert check_once(trainer) is None
    found = []
    for trial in range(trials):
        victim = random.Random(trial).randrange(world.world_size)
        with fault.active(kind, trial, passes) if world.rank == victim else contextlib.nullcontext():
            failed = check_once(trainer)
        found.append((victim, list(failed.faulty) if failed else [], str(failed)))
        assert check_once(trainer) is None, "the fault is gone"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "trials", "passes", "size", "words"),
    [
        ("gradient", 200, 1, 3, "has computed wrong gradients, but does not do so again: a transient fault"),
        ("gradient", 40, 1000, 4, "has computed wrong gradients, and does so again"),
        ("buffer", 20, 1, 3, "has computed wrong buffers, but does not do so again"),
        ("buffer", 20, 1000, 3, "has computed wrong buffers, and does so again"),
        ("weights", 20, 1, 3, "the weights of rank"),
        ("optimizer", 20, 1, 3, "the optimizer state of rank"),
        ("images", 20, 1, 3, "has computed wrong images, and does so again"),
    ],
)
def test_flipped_bits_are_found_and_their_rank_is_named(
    ranks: RankPool, kind: str, trials: int, passes: int, size: int, words: str
) -> None:
    for found in ranks.run(plant, size, kind, trials, passes)[:1]:
        wrong = [(victim, named, text) for victim, named, text in found if named != [victim] or words not in text]
        assert not wrong, wrong[:3]
        assert len(found) == trials


def test_a_flipped_bit_of_a_gradient_is_found_on_two_ranks_and_on_one(ranks: RankPool) -> None:
    """Two ranks cannot tell who is wrong if the fault repeats, and one rank finds only faults that do not."""
    for victim, named, text in ranks.run(plant, 2, "gradient", 3, 1)[0]:
        assert (named, "transient" in text) == ([victim], True)
    for _, named, text in ranks.run(plant, 2, "gradient", 3, 1000)[0]:
        assert (named, "one of ranks 0 and 1 computes wrong gradients" in text) == ([0, 1], True)
    for _, named, text in ranks.run(plant, 1, "gradient", 3, 1)[0]:
        assert (named, "transient" in text) == ([0], True)
    assert all(not named for _, named, _ in ranks.run(plant, 1, "gradient", 3, 1000)[0])


# -- a run


class Checks(Rows):
    def log(self, scalars: Scalars, step: int) -> None:
        if "run/verified_micro_batches" in scalars:
            self.rows.append({"step": step, "compared": scalars["run/verified_micro_batches"]})

    def sync(self) -> None:
        pass


def fit(world: World, folder: str, arguments: tuple[str, ...], faulty_from: int | None) -> tuple[str, str, list[Any]]:
    """Train; return the error and its type, and the rows of the checks. From a step on, rank 1 computes wrong gradients."""
    own = Checkpoints(Path(folder), keep=1)
    checkpoints = own if world.is_main else NullCheckpoints(own)
    trainer = trainer_of(world, *arguments, checkpoints=checkpoints)
    fault, rows = Fault(trainer), Checks()
    if faulty_from is not None and world.rank == 1:
        fault.kind = "gradient"
        gradients = trainer.train_step.gradients

        def later(batch: Any, step: int, metrics: Any) -> Tensor:
            fault.passes_left = 10**6 if step >= faulty_from else 0
            return gradients(batch, step, metrics)

        trainer.train_step.gradients = later  # type: ignore[method-assign]
    try:
        trainer.fit(rows)
    except RunError as error:
        return type(error).__name__, str(error), []
    return "", "", rows.rows


@pytest.mark.parametrize(
    ("size", "arguments", "compared"),
    [
        (3, ("train.global_batch_size=16",), 3),  # 4 micro-batches on 3 ranks
        (2, ("train.global_batch_size=24", "precision=fp32", "data.oversample=true", "augment.mixup=0.5"), 2),
        (2, ("train.global_batch_size=8", "precision=bf16", "train.reproducible=true"), 2),
        (1, ("train.global_batch_size=8", "train.micro_batch_size=null"), 1),
        (3, ("train.global_batch_size=8", "train.micro_batch_size=8", "precision=fp16"), 3),
    ],
)
def test_healthy_runs_are_not_accused(
    ranks: RankPool, tmp_path: Path, size: int, arguments: tuple[str, ...], compared: int
) -> None:
    kind, text, rows = ranks.run(fit, size, str(tmp_path), arguments, None)[0]
    assert (kind, text) == ("", "")
    assert len(rows) == rows[-1]["step"]
    assert {row["compared"] for row in rows[:-1]} == {compared}


def test_a_check_changes_no_bit_of_a_run(ranks: RankPool, tmp_path: Path) -> None:
    sizes = ("train.global_batch_size=16", "augment.name=helpers:noise")
    for name, more in (("a", ()), ("b", ("train.verify_every=null",))):
        (tmp_path / name).mkdir()
        ranks.run(fit, 2, str(tmp_path / name), (*sizes, *more), None)
    one, other = (Checkpoints(tmp_path / name, keep=1).load_latest() for name in ("a", "b"))
    assert one is not None
    assert other is not None
    for part in ("model", "optimizer"):
        torch.testing.assert_close(one.state[part], other.state[part], rtol=0, atol=0)


@pytest.mark.parametrize("action", ["stop", "exclude"])
def test_a_run_on_a_wrong_device_ends_and_keeps_only_checkpoints_before_the_last_check(
    ranks: RankPool, tmp_path: Path, action: str
) -> None:
    """Checks after steps 4 and 8, checkpoints after each step; the device is wrong from step 6 on."""
    arguments = ("train.global_batch_size=12", "train.epochs=3", "train.verify_every=4", "checkpoint.every_steps=1")
    results = ranks.run(fit, 3, str(tmp_path), (*arguments, f"train.on_corruption={action}"), 5)
    kinds = [kind for kind, *_ in results]
    assert kinds == [NoRestart.__name__] * 3 if action == "stop" else ["RunError", FaultyReplica.__name__, "RunError"]
    text = results[0][1]
    assert text.startswith("in step 8, rank 1 has computed wrong gradients, and does so again (rank 1 is on ")
    assert text.endswith(f"the last good checkpoint is {tmp_path}/step_00000003.pt")
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["latest.pt", "step_00000003.pt", "unverified_step_00000007.pt"]
    assert (tmp_path / "latest.pt").resolve().name == "step_00000003.pt"


class Restless(nn.Sequential):
    """A model whose passes are not bitwise repeatable."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(images * (1 + self.passes / 100))  # type: ignore[no-any-return]


def test_the_second_step_of_a_start_is_checked_without_a_row(ranks: RankPool, tmp_path: Path) -> None:
    assert (
        ranks.run(fit, 2, str(tmp_path), ("train.global_batch_size=8", "train.verify_every=100"), None)
        == [("", "", [])] * 2
    )
    assert Checkpoints(tmp_path, keep=1).verified_step == 1


class OwnState(torch.optim.SGD):
    """An optimizer with another state on each rank."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["own"] = torch.tensor(dist.get_rank())
        return super().step(closure)


def test_an_optimizer_may_have_another_state_on_each_rank(ranks: RankPool, tmp_path: Path) -> None:
    arguments = ("train.global_batch_size=8", "optim.name=test_verification:OwnState", "checkpoint.on_failure=false")
    kind, text, rows = ranks.run(fit, 2, str(tmp_path), arguments, None)[0]
    assert (kind, text) == ("", "")
    assert {row["compared"] for row in rows} == {2}
    kind, text, rows = ranks.run(fit, 2, str(tmp_path), arguments, 4)[0]
    assert "one of ranks 0 and 1 computes wrong gradients" in text


@pytest.mark.parametrize("size", [1, 3])
def test_a_model_that_does_not_repeat_its_bits_is_not_a_faulty_device(
    ranks: RankPool, tmp_path: Path, size: int
) -> None:
    arguments = ("train.global_batch_size=12", "model.name=test_verification:Restless")
    assert ranks.run(fit, size, str(tmp_path), arguments, None) == [("", "", [])] * size


def test_ranks_that_cannot_be_compared_are_not(
    alone: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", "ddp_cifar")
    other = ("a CPU with AVX2", torch.__version__, 1)
    monkeypatch.setattr(World, "gather_objects", lambda self, value: [value, other])
    trainer = trainer_of(alone, "train.global_batch_size=8")
    assert trainer.verifier.every is None
    assert "devices are not verified (train.verify_every=1): ranks differ (" in caplog.text
    assert "a CPU with AVX2, torch" in caplog.text


# -- verdicts

A, B, C = Digest(1, 1, 1), Digest(1, 2, 1), Digest(1, 3, 1)


@pytest.mark.parametrize(
    ("disputes", "repeated", "ranks", "words"),
    [
        ({(0, 1): (A, B)}, [[A, A, A]], [1], "transient"),
        ({(0, 1): (A, B)}, [[B, B, B]], [0], "transient"),
        ({(0, 1): (A, B), (1, 2): (C, A)}, [[A, B, A], [A, C, A]], [1], "does so again"),
        ({(0, 1): (A, B)}, [[A, B]], [0, 1], "one of ranks 0 and 1"),
        ({(0, 1): (A, B)}, [[A, B, C]], [], "most ranks have computed different bits"),
        ({(0, 0): (A, B)}, [[A]], [0], "transient"),
    ],
)
def test_what_most_ranks_compute_is_right(disputes: Any, repeated: Any, ranks: list[int], words: str) -> None:
    verdict = judge(disputes, repeated)
    assert list(verdict.ranks) == ranks
    assert words in verdict.text


def test_states_that_differ() -> None:
    assert judge_states([(1, 5), (1, 5), (2, 5)])[:2] == ("the weights of rank 2 differ from the other ranks'", [2])
    assert list(judge_states([(1, 5), (1, 6)]).ranks) == [0, 1]
