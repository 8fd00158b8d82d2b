"""Checks that devices compute right: a rank computes a micro-batch of another rank again, bitwise the same."""

import contextlib
import functools
import socket
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddp_cifar.config import TrainConfig
from ddp_cifar.data.loader import MicroBatch, TrainLoader
from ddp_cifar.distributed.collectives import ranks_text
from ddp_cifar.distributed.world import World
from ddp_cifar.log import log
from ddp_cifar.run.diagnosis import VERIFIED
from ddp_cifar.run.environment import cpu_model, device_name
from ddp_cifar.seeding import seed_dropout
from ddp_cifar.training.fingerprint import combine, fingerprint, hash_of
from ddp_cifar.training.progress import Failed, Progress, due
from ddp_cifar.training.step import TrainStep
from ddp_cifar.training.verdict import NOT_REPEATED, Digest, Verdict, judge, judge_states


class Verifier:
    """Compares micro-batches between ranks, every `train.verify_every` steps, before the update.

    The digest of a micro-batch is taken from the training pass itself. In the same state, another rank computes the micro-batch
    again. Which ones are compared changes from check to check. With one rank, it computes its own again.

    There is also one in the second step of a start, in which each rank computes its own again too. If a rank does not repeat its
    bits, the model may not be deterministic: there are no more checks. A lack of memory is also found then, not hours later.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        train_step: TrainStep,
        loader: TrainLoader,
        on_verified: Callable[[int], None],
    ) -> None:
        """`on_verified` is called with the number of completed steps, in a state that a check has found nothing wrong with."""
        self.world = world
        self.train_step = train_step
        self.loader = loader
        self.on_verified = on_verified
        self.every = every = config.verify_every
        self.ends_job = config.on_corruption == "stop"
        self._start = self._steps = 0
        """The step with which this start began, and the number of steps since then."""
        self._repeats = False
        """True if the ranks have been seen to repeat their bits."""
        self._same_optimizer: bool | None = None
        """True if the optimizer's state is the same on all ranks; None before it has one. A user's may divide it among them."""
        self.parameters = [parameter for parameter in train_step.model.parameters() if parameter.requires_grad]
        if every is not None and (reason := _why_not(world, train_step)):
            log.info(f"devices are not verified (train.verify_every={every}): {reason}")
            self.every = None

    @contextlib.contextmanager
    def checking(self, progress: Progress) -> Iterator[dict[str, float]]:
        """Compute the gradients of the next step in the body. If a check is due, compare the ranks' digests afterwards.

        Every rank must call it. Yields a row of metrics that is filled then. Raises `Failed`, which names the ranks whose device
        is wrong.
        """
        row: dict[str, float] = {}
        if not self._steps:
            self._start = progress.step
        is_due, self._steps = due(progress.step + 1, self.every), self._steps + 1
        if not is_due and (self.every is None or self._steps != 2):
            yield row
            return
        recorded: list[Callable[[], Digest]] = []
        index = self._index_of(self.world.rank, progress)

        def record(batch: MicroBatch) -> contextlib.AbstractContextManager[object]:
            return self._recording(batch, recorded) if batch.index == index else contextlib.nullcontext()

        self.train_step.around_pass = record
        try:
            yield row
        finally:
            self.train_step.around_pass = contextlib.nullcontext
        started = time.perf_counter()
        if compared := self._check(progress, recorded[0]() if recorded else Digest()):
            self.on_verified(progress.step)
            if is_due:  # rows must not depend on when a run is started again
                row |= {VERIFIED: compared, "time/verify_s": time.perf_counter() - started}

    def _check(self, progress: Progress, own: Digest) -> int:
        """Compare the ranks' digests; return the number of micro-batches that were compared, 0 if they cannot be.

        The weights and the optimizer's state are compared first: if they differ, so does everything that follows from them.
        """
        of, by = self._pairs(progress)
        index = of[self.world.rank]
        state = fingerprint(self.train_step.model), self._hash_of_optimizer()
        again = self._compute(index, progress) if index is not None else Digest()
        mine = self._index_of(self.world.rank, progress)
        repeats = self._repeats or mine is None or self._compute(mine, progress) == own
        rows = self.world.gather([*state, *own, *again, repeats])
        if self._same_optimizer is None and any(row[1] for row in rows):
            self._same_optimizer = len({row[1] for row in rows}) == 1
            if not self._same_optimizer:
                log.info("the ranks' optimizer states are not compared: the optimizer gives each rank its own")
        states = [(row[0], row[1] if self._same_optimizer else 0) for row in rows]
        first, checks = [Digest(*row[2:5]) for row in rows], [Digest(*row[5:8]) for row in rows]
        self._repeats, others = True, [rank for rank, row in enumerate(rows) if not row[8]]
        wrong = [
            (rank, found) for rank, found in enumerate(of) if found is not None and checks[rank] != first[by[rank]]
        ]
        if len(set(states)) > 1:
            verdict = judge_states(states)
        elif others:
            verdict = Verdict(f"two passes over the same images on {ranks_text(others)} are not bitwise identical", [])
        elif wrong:
            repeated = [self._repeat(found, progress) for _, found in wrong]
            verdict = judge({(by[rank], rank): (first[by[rank]], checks[rank]) for rank, _ in wrong}, repeated)
        else:
            return sum(found is not None for found in of)
        if not verdict.ranks:
            log.warning(
                f"devices are not verified any more: in step {progress.step + 1}, {verdict.text}: {NOT_REPEATED}"
            )
            self.every = None
            return 0
        hosts = self.world.gather_objects(socket.gethostname())
        where = ", ".join(f"rank {rank} is on {hosts[rank]}" for rank in verdict.ranks)
        text = f"in step {progress.step + 1}, {verdict.text} ({where})"
        ends_job = self.ends_job or not verdict.is_certain
        raise Failed(text, faulty=verdict.ranks, ends_job=ends_job, wrong_since=self._start)

    # -- which micro-batches are compared

    def _index_of(self, rank: int, progress: Progress) -> int | None:
        """The micro-batch of a rank that the next step's check looks at; None if the rank has none."""
        plan = self.train_step.plan
        share = plan.shares(len(plan.images_of(progress.step_in_epoch)))[rank]
        return share[self._number(progress) % len(share)] if share else None

    def _pairs(self, progress: Progress) -> tuple[list[int | None], list[int]]:
        """For each rank, the micro-batch that it computes again, and the rank that has trained on it."""
        size = self.world.world_size
        shift = 1 + self._number(progress) % (size - 1) if size > 1 else 0
        by = [(rank + shift) % size for rank in range(size)]
        return [self._index_of(rank, progress) for rank in by], by

    def _number(self, progress: Progress) -> int:
        """The number of the check in the run."""
        assert self.every
        return progress.step // self.every

    # -- digests

    @contextlib.contextmanager
    def _recording(self, batch: MicroBatch, recorded: list[Callable[[], Digest]]) -> Iterator[None]:
        """Record the digest of the forward and backward pass in the body."""
        hashes = _Hashes(self.train_step, batch)
        handles = [
            parameter.register_hook(functools.partial(hashes.add, position))
            for position, parameter in enumerate(self.parameters)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        recorded.append(hashes.digest)

    def _compute(self, index: int, progress: Progress) -> Digest:
        """Compute any micro-batch of the next step in this state, and return its digest. The state stays the same."""
        step = self.train_step
        batch = self.loader.micro_batch(progress.epoch, progress.step_in_epoch, index)
        hashes = _Hashes(step, batch)
        with step.buffers.undone():
            seed_dropout(self.world.device, step.config.seed, progress.step, index)
            if step.config.train.compile != "off":
                torch.compiler.cudagraph_mark_step_begin()
            with step.autocast():
                logits = step.model(batch.images)
            loss = step.loss(logits.float(), batch.targets).sum() * step.loss_scale
            gradients = torch.autograd.grad(step.scaler.scale(loss), self.parameters, allow_unused=True)
            for position, gradient in enumerate(gradients):
                if gradient is not None:
                    hashes.add(position, gradient)
            return hashes.digest()

    def _repeat(self, index: int, progress: Progress) -> list[Digest]:
        """Return what each rank computes for a micro-batch now."""
        return [Digest(*row) for row in self.world.gather(self._compute(index, progress))]

    def _hash_of_optimizer(self) -> int:
        """Return a hash of the optimizer's state, 0 if it has none."""
        states = self.train_step.optimizer.state
        tensors = [
            value
            for parameter in self.train_step.model.parameters()
            for _, value in sorted(states.get(parameter, {}).items())
            if isinstance(value, Tensor)
        ]
        return combine([hash_of(tensor).to(self.world.device) for tensor in tensors]) if tensors else 0


class _Hashes:
    """Collects the hashes of one micro-batch, on the device."""

    def __init__(self, step: TrainStep, batch: MicroBatch) -> None:
        self.step = step
        self.images = [hash_of(batch.images), hash_of(batch.targets)]
        self.gradients: dict[int, Tensor] = {}
        self.buffers: list[Tensor] = []

    @torch.no_grad()
    def add(self, position: int, gradient: Tensor) -> None:
        """Add the gradient of a parameter. The buffers are those after the forward pass until the backward pass has ended."""
        if not self.gradients:
            self.buffers = [hash_of(flat) for flat in self.step.buffers.values()]
        self.gradients[position] = hash_of(gradient) + position

    def digest(self) -> Digest:
        """Return the digest. Waits for the device."""
        gradients = [self.gradients[position] for position in sorted(self.gradients)]
        return Digest(combine(self.images), combine(gradients), combine(self.buffers))


def _why_not(world: World, step: TrainStep) -> str:
    """Say why the bits of ranks cannot be compared; "" if they can be."""
    on_gpu = world.device.type == "cuda"
    if on_gpu and not torch.are_deterministic_algorithms_enabled():
        return "this needs train.deterministic=true"
    if world.device.type not in ("cpu", "cuda"):
        return f"this needs device cpu or cuda, found {world.device.type}"
    name = device_name(world.device) if on_gpu else cpu_model()
    own = (name, str(torch.__version__), 0 if on_gpu else torch.get_num_threads())
    kinds = sorted(
        {f"{name}, torch {version}, {threads} CPU threads" for name, version, threads in world.gather_objects(own)}
    )
    return f"ranks differ ({'; '.join(kinds)})" if len(kinds) > 1 else ""
