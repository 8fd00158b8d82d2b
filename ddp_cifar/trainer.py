"""The training loop: what happens in a step, in an epoch, and in a run.

A step's global batch is cut into micro-batches in a fixed way, and ranks only share them out. The loss of each is a sum over
images divided by the images of the global batch, so that gradients add up to the mean's, short last batch included.
"""

import contextlib
import dataclasses
import functools
import math
import socket
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ddp_cifar import dashboard
from ddp_cifar.buffers import BufferMean
from ddp_cifar.checkpoint import Checkpoints, State, load_weights
from ddp_cifar.config import Config, TrainConfig, to_dict
from ddp_cifar.data.augment import transform
from ddp_cifar.data.loader import EvalLoader, MicroBatch, StepBatch, TrainLoader
from ddp_cifar.data.sampler import is_power_of_two
from ddp_cifar.distributed import World
from ddp_cifar.environment import name_of
from ddp_cifar.errors import RunError, UserError
from ddp_cifar.fingerprint import fingerprint
from ddp_cifar.heartbeat import Heartbeat, NullHeartbeat
from ddp_cifar.inference import count_batches, forward_pass, put_in_place
from ddp_cifar.log import log
from ddp_cifar.metrics import Counter, PhaseTimer, Span, Totals, ledger_numbers, peak_memory
from ddp_cifar.optim import Schedule, effective_lr, load_optimizer_state
from ddp_cifar.precision import autocast
from ddp_cifar.profile import Profile
from ddp_cifar.run_dir import Start
from ddp_cifar.seeding import seed_dropout
from ddp_cifar.stopping import REASONS, Agreement, Requests
from ddp_cifar.tracking import NullTracker, Scalars, Tracker
from ddp_cifar.tree_sum import TreeReduction

STRAGGLER_FLOOR_US = 1000
"""A rank that is slower by less than this, in microseconds a step, is no straggler."""
COMPILED_WARM_UP = 3
"""Passes of a size: to compile, to run once, and to record the CUDA graph."""
MOST_LOGITS = 50_000_000
"""Images times classes, beyond which an evaluation has no pictures: they would take 200 MB of each rank's memory."""
SAVE_PATIENCE_S = 60.0
"""For an earlier save; a disk that takes longer costs checkpoints rather than time."""


@dataclass
class Progress:
    """How far a run is. With the config and the weights, all that it takes to go on."""

    epoch: int = 0
    """Epochs completed."""
    step_in_epoch: int = 0
    """Steps completed of the epoch that is under way."""
    step: int = 0
    """Steps completed in the run."""
    evaluating: bool = False
    """The steps of the epoch (or of the run) are done, their evaluation is not."""
    train: Totals = dataclasses.field(default_factory=Totals)
    """Over the images of the epoch that is under way, as they were trained on, but for those in `window`."""
    window: Totals = dataclasses.field(default_factory=Totals)
    """Over the images since the last row of scalars."""
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    """The scalars of the last evaluation, such as `test/accuracy`."""
    best_val_accuracy: float = -1.0
    best_step: int | None = None
    """At which that was; None without validation images."""
    updates: int = 0
    """Steps whose update was not left out."""
    data: str = ""
    """What the run trains on, in words and a checksum of the labels: steps and sample ids mean nothing with other data."""
    conditions: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the results depend on, but the config does not say: derived from the hardware and the number of ranks."""

    def is_finished(self, train: TrainConfig) -> bool:
        """True where `train` asks for no step more, and the last one is evaluated."""
        enough = self.epoch >= train.epochs or (train.max_steps is not None and self.step >= train.max_steps)
        return enough and not self.evaluating

    def state_dict(self) -> State:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in {
            "updates": state.get("step", 0),
            **state,
        }.items():  # an older checkpoint does not count them
            try:
                setattr(self, name, Totals(**value) if name in ("train", "window") else value)
            except TypeError as error:
                raise UserError(
                    f"the checkpoint's progress was made by another version of ddp_cifar ({error}): go on with that one, or "
                    f"start a new run from its weights, with model.init"
                ) from error

    def __str__(self) -> str:
        names = {"train/accuracy": "training", "val/accuracy": "validation", "test/accuracy": "test"}
        accuracies = [
            f"{name} accuracy {100 * self.results[tag]:.2f}%" for tag, name in names.items() if tag in self.results
        ]
        return ", ".join([f"epoch {self.epoch}, step {self.step}", *accuracies])


class Stopped(Exception):
    """All ranks have agreed to leave; carries the reason."""


class Report(NamedTuple):
    """What a rank tells the others every `train.agree_every` steps: integers."""

    reason: int
    """Why it would stop: an index into `REASONS`."""
    save: int
    """1: it was asked for a checkpoint."""
    fingerprint: int
    """Of its weights, at the last step at which it was due."""
    window: int
    """The step of its last row of scalars, since which ..."""
    own_us: int
    """... a step took it so many microseconds of work that no other rank can hold up, of which ..."""
    data_us: int
    """... so many were the batch's."""


class Trainer:
    """Trains `model` on every rank of `world`. All parts are built by the caller and equal on all ranks."""

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        train: TrainLoader,
        test: EvalLoader | None,
        val: EvalLoader | None,
        checkpoints: Checkpoints,
        precision: str,
        data: str = "",
        classes: Sequence[str] = (),
        show_progress: bool = False,
    ) -> None:
        self.config = config
        self.world = world
        self.plan = train.sampler.plan
        self.model = model
        self.ddp = world.wrap(model, config.comm.bucket_mb, config.comm.hook)
        self.tree: TreeReduction | None = None
        if config.train.reproducible:
            if not isinstance(self.ddp, DistributedDataParallel):
                raise UserError(f"train.reproducible=true needs device cpu or cuda, found {world.device.type}")
            self.tree = TreeReduction(world, self.ddp)
        self.optimizer = optimizer
        self.schedule = Schedule(
            optimizer, config.optim, steps_per_epoch=self.plan.steps_per_epoch, epochs=config.train.epochs
        )
        self.train, self.test, self.val = train, test, val
        self.checkpoints = checkpoints
        self.precision = precision
        self.classes = list(classes)
        # multiplies the loss so that small fp16 gradients do not vanish, and leaves out an update that overflowed
        self.scaler = GradScaler(world.device.type, enabled=precision == "fp16")
        self.ema: AveragedModel | None = None
        if config.train.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.train.ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.show_progress = show_progress
        self.evaluated = self.ema.module if self.ema else model
        if config.train.compile != "off":
            self._compile(config.train.compile)

        conditions = {"precision": precision, "micro-batches a step": str(self.plan.num_micro_batches)}
        conditions["torch"] = str(torch.__version__)
        conditions["device"] = name_of(world.device)
        if world.device.type == "cpu":
            conditions["threads a rank"] = str(torch.get_num_threads())
        self.progress = Progress(data=data, conditions=conditions)
        self.last_step = self.schedule.total_steps
        if config.train.max_steps is not None:
            self.last_step = min(self.last_step, config.train.max_steps)
        start_sum = self.tree.start_sum if self.tree else world.start_sum
        self.buffers = BufferMean(model, self.plan.num_micro_batches, start_sum)
        numbers = ledger_numbers(len(train.split.images)).to(world.device)
        self.counter = Counter(world.device, numbers)
        self.all_images = int(numbers[train.split.sample_ids].sum())
        self.norms: list[Tensor] = []
        self.timer = PhaseTimer(world.device)
        self.epoch, self.window = Span(), Span()

        self.tracker: Tracker = NullTracker()
        self.requests = Requests()
        self.heartbeat: Heartbeat | NullHeartbeat = NullHeartbeat()
        self.start: Start | None = None
        self.profile: Profile | None = None
        self.agreement = Agreement(world, config.train.agree_every)
        self.report = Report(0, 0, 0, 0, 0, 0)
        self.save_due = False
        self.own_us: list[int] = []  # of each rank, as they last told
        self.slow_since: dict[int, int] = {}
        self.reported: set[int] = set()
        self.last_norm = 0.0
        self.resumed_at = self.saved_at = time.perf_counter()
        self.waiting_s = 0.0  # for saves
        if config.train.compile == "off":
            self._settle_buckets()
        else:
            self._warm_up_compiled()

    # -- a run

    def fit(
        self,
        tracker: Tracker | None = None,
        requests: Requests | None = None,
        heartbeat: Heartbeat | None = None,
        start: Start | None = None,
        profile: Profile | None = None,
    ) -> str:
        """Train from where `progress` is to the last step, or until ranks agree to stop; returns why, or "" at the end.

        `tracker` gets the scalars. `requests` are what this rank is asked meanwhile, `heartbeat` its signs of life.
        `start` says what the run went through before. `profile` records some steps. Raises `RunError` on every rank if
        the run cannot go on.
        """
        self.tracker = tracker or self.tracker
        self.requests = requests or self.requests
        self.heartbeat = heartbeat or self.heartbeat
        self.start = start
        self.profile = profile
        self.resumed_at = self.saved_at = time.perf_counter()
        reason = ""
        try:
            with self.heartbeat.watching():
                try:
                    while not self.progress.is_finished(self.config.train):
                        self.train_epoch()
                        self.finish_epoch()
                except Stopped as stopped:
                    reason = str(stopped)
                    self._finish_saves()  # this one must be kept, however long an earlier one takes
                    self.save()
                self.agreement.finish()
        finally:
            self.checkpoints.finish()
        if self.profile:
            self.profile.close()
        return reason

    def poll(self) -> None:
        """After each step, and each batch of an evaluation: learn what all ranks were asked, and act on it as all do.

        Raises `Stopped` on every rank at the same call, or `RunError`.
        """
        self.heartbeat.beat(self.progress.step)
        reports = self.agreement.poll(self._say)
        if not reports:
            return
        everyone = [Report(*numbers) for numbers in reports]
        self.own_us = [report.own_us for report in everyone if report.window]
        self._compare_replicas(everyone)
        self._look_for_stragglers(everyone)
        self.save_due |= any(report.save for report in everyone)
        for rank, report in enumerate(everyone):
            if report.reason:
                reason = REASONS[report.reason]
                raise Stopped(reason if self.world.world_size == 1 else f"{reason} (rank {rank})")

    def save(self) -> None:
        """Keep the state as it is; every rank must call it. Training goes on while rank 0 writes."""
        self._settle_sums()
        self.save_due = False
        self.saved_at = time.perf_counter()
        self._finish_saves(SAVE_PATIENCE_S)
        # its rows go first: of one that is there, the rows up to it are
        self.checkpoints.save(self.state_dict(), self.progress.step, self.progress.best_step, first=self.tracker.sync)
        self.waiting_s += time.perf_counter() - self.saved_at

    def state_dict(self) -> State:
        """All that a run needs to go on: plain dicts, lists, tensors, numbers and strings."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress.state_dict(),
            "config": to_dict(self.config),
            "classes": self.classes,
            "image_size": self.train.split.image_size,
        }
        if self.ema:
            state["ema"] = self.ema.module.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: State, source: str) -> None:
        """Go on from a state. Raises `UserError`, which names `source`, if its data or its weights are not this run's."""
        before, now = Progress(), self.progress
        before.load_state_dict(state["progress"])
        if before.data != now.data:
            raise UserError(
                f"{source} was made with other data ({before.data}) than is here ({now.data}): "
                f"restore what it had, or start a new run with another run_dir"
            )
        for name, value in now.conditions.items():
            if before.conditions.get(name) != value:
                log.warning(f"{name} was {before.conditions.get(name)} in {source}, now {value}: results will differ")
        load_weights(self.model, state["model"], source)
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.ema:
            load_weights(self.ema.module, state["ema"], source)
            self.ema.n_averaged.fill_(before.updates)  # what is 0 is overwritten by the next weights
        if "scaler" in state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        before.conditions = now.conditions
        self.progress = before

    # -- an epoch

    def train_epoch(self) -> None:
        """Train to the epoch's end, or to the run's last step where that comes first."""
        progress, log_every, save_every = self.progress, self.config.train.log_every, self.config.checkpoint.every_steps
        fingerprint_every, histograms_every = self.config.train.fingerprint_every, self.config.tracking.histograms_every
        steps = min(self.plan.steps_per_epoch, progress.step_in_epoch + self.last_step - progress.step)
        progress.evaluating = False
        self.model.train()
        self.epoch, self.window = Span(), Span()
        batches = self.timer.timed("data", self.train.steps(progress.epoch, progress.step_in_epoch))
        with tqdm(
            total=self.plan.steps_per_epoch,
            initial=progress.step_in_epoch,
            desc=f"epoch {progress.epoch + 1}",
            unit="step",
            leave=False,
            disable=not self.show_progress,
        ) as bar:
            while progress.step_in_epoch < steps:
                if self.profile:
                    self.profile.before_step(progress.step + 1)
                self.train_step(next(batches))
                if self.profile:
                    self.profile.after_step(progress.step)
                bar.update()
                if progress.step % log_every == 0:
                    self.log_window()
                if fingerprint_every is not None and progress.step % fingerprint_every == 0:
                    self.log_fingerprint()
                if histograms_every is not None and progress.step % histograms_every == 0:
                    self.tracker.show(lambda board: dashboard.add_histograms(board, self.model, progress.step))
                progress.evaluating = progress.step_in_epoch == steps
                self.save_due |= save_every is not None and progress.step % save_every == 0
                self.poll()
                if self.save_due and not progress.evaluating:  # else after the evaluation
                    self.save()
        progress.evaluating = True
        self.epoch_seconds = self.epoch.seconds
        self._settle_sums()
        self.timer.read()

    def finish_epoch(self) -> None:
        """Check that each image was counted once, evaluate, print the article's line, and save, each when it is due."""
        config, progress = self.config, self.progress
        ended = progress.step_in_epoch == self.plan.steps_per_epoch
        is_last = progress.step == self.last_step
        number = progress.epoch + 1
        totals = progress.train + progress.window
        if ended:
            self._check_ledger(totals)

        scalars: dict[str, float | str] = {"fingerprint": self.take_fingerprint()}
        scalars |= {"train/epoch": number, "train/epoch_loss": totals.mean_loss}
        scalars |= {"ledger/images": totals.images, "ledger/sum": f"{totals.ledger:016x}"}
        if self.epoch.images:  # else only the evaluation was left to do
            scalars["train/epoch_images_per_s"] = self.epoch.images / self.epoch_seconds
        scalars["time/epoch_s"] = self.epoch_seconds
        is_best = False
        logits: Tensor | None = None
        if is_last or number % config.eval.every == 0:
            started = time.perf_counter()
            results = {"train/accuracy": totals.accuracy}
            if config.eval.train_accuracy == "full":
                results["train/accuracy"] = self.evaluate(self.train, augmented=True).accuracy
            for name, loader in (("val", self.val), ("test", self.test)):
                if loader is not None:
                    shown = self._logits_to_show(name, is_last)
                    found = self.evaluate(loader, logits=shown)
                    if shown is not None:
                        logits = self.world.sum(shown)
                    results |= {f"{name}/loss": found.mean_loss, f"{name}/accuracy": found.accuracy}
            scalars |= results | {"time/evaluation_s": time.perf_counter() - started}
            # all at once: a stop in the middle of an evaluation leaves what was before it
            progress.results = results
            val_accuracy = results.get("val/accuracy", -1.0)
            is_best = val_accuracy > progress.best_val_accuracy
            if is_best:
                progress.best_val_accuracy, progress.best_step = val_accuracy, progress.step
        self.tracker.log(scalars | self._survival(), progress.step)
        log.info(_epoch_line(scalars, "" if ended else f" (to step {progress.step})"))
        if logits is not None:
            self._show(logits)
        if is_last and config.tracking.projector and self._shown:
            split, batch_size = self._shown[1].split, config.eval.batch_size
            self.tracker.show(
                lambda board: dashboard.add_projector(
                    board, split, self.evaluated, self.classes, batch_size, progress.step
                )
            )

        progress.evaluating = False
        if ended:
            progress.epoch += 1
            progress.step_in_epoch = 0
            progress.train = progress.window = Totals()
        if is_last:  # no exchange may come any more that compares the last fingerprints
            self._compare_replicas([Report(*numbers) for numbers in self.world.gather(self.report)])
        if is_last or is_best or self.save_due or number % config.checkpoint.every_epochs == 0:
            self.save()

    # -- a step

    def train_step(self, batch: StepBatch) -> None:
        """One update from this rank's micro-batches of the step."""
        self.lr = self.schedule.before_step(self.progress.step)
        self.buffers.begin_step()
        self._zero_grad()
        skips = self.config.train.on_nonfinite == "skip"
        kept = [buffer.clone() for buffer in self.model.buffers()] if skips else []
        last = len(batch) - 1
        for position, micro_batch in enumerate(self.timer.timed("data", batch)):
            # ranks exchange gradients once a step, in the last micro-batch's backward
            try:
                with contextlib.nullcontext() if position == last else self.ddp.no_sync():
                    self.forward_backward(micro_batch, batch.num_images, is_last=position == last)
            except torch.OutOfMemoryError:
                message = self._out_of_memory()
                raise UserError(message) from None
        with self.timer.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            self.norms.append(norm)
            if skips and not self.scaler.is_enabled() and not torch.isfinite(norm):
                log.warning(f"step {self.progress.step + 1}: the gradient's norm is {norm:g}; its update is left out")
                _restore(self.model.buffers(), kept)
            else:
                self.update(norm)
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        for span in (self.epoch, self.window):
            span.steps += 1
            span.images += batch.num_images

    def update(self, norm: Tensor) -> None:
        """Change the weights by the step's gradients, whose norm is `norm`."""
        if self.config.train.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.train.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.updates += 1
        if self.ema:
            self.ema.update_parameters(self.model)
            for average, buffer in zip(self.ema.module.buffers(), self.model.buffers(), strict=True):
                if not buffer.is_floating_point():
                    average.copy_(buffer)  # a count has no average

    def forward_backward(self, micro_batch: MicroBatch, step_images: int, *, is_last: bool) -> None:
        """Add a micro-batch's part to the gradients of a step that has `step_images` images over all ranks."""
        with self.timer.phase("forward"):
            # dropout by the micro-batch's place in the run, so that it is the same on whatever rank
            seed_dropout(self.world.device, self.config.seed, self.progress.step, micro_batch.index)
            self.buffers.begin_micro_batch()
            logits = self._logits(micro_batch.images)
            smoothing = self.config.train.label_smoothing
            losses = F.cross_entropy(logits.float(), micro_batch.labels, reduction="none", label_smoothing=smoothing)
            self.buffers.end_micro_batch(weight=len(losses) / step_images)
            self.counter.add(losses.detach(), logits.detach(), micro_batch.labels, micro_batch.sample_ids)
        with self.timer.phase("backward"):  # in which ranks wait for each other
            set_buffers = self.buffers.start_reducing() if is_last else None
            # DDP divides the sum over ranks by their number, which here is in step_images already; the tree does not
            loss = losses.sum() * ((1 if self.tree else self.world.world_size) / step_images)
            self.scaler.scale(loss).backward()
            if set_buffers:
                set_buffers()
            if self.tree:
                self.tree.end_micro_batch(is_last=is_last)

    def _logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, classes), through DDP."""
        if self.config.train.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()  # what the last pass's graphs have returned is used up
        with self.autocast():
            logits: Tensor = self.ddp(images)
        return logits

    def autocast(self) -> torch.autocast:
        return autocast(self.precision, self.world.device)

    def log_window(self) -> None:
        """A row of scalars over the steps since the last one, or since the epoch's start."""
        self._settle_sums()
        progress, totals = self.progress, self.progress.window
        progress.train += totals
        progress.window = Totals()
        seconds, steps = self.window.seconds, self.window.steps
        phases = {name: total / steps for name, total in self.timer.read().items()}
        own_s = phases["data"] + phases["forward"] + phases["optimizer"]
        self.report = self.report._replace(
            window=progress.step, own_us=round(own_s * 1e6), data_us=round(phases["data"] * 1e6)
        )
        scalars: dict[str, float | str] = {
            "train/loss": totals.mean_loss,
            "train/batch_accuracy": totals.accuracy,
            "train/lr": self.lr,
            "train/grad_norm": self.last_norm,
            "train/weight_norm": nn.utils.get_total_norm([p.detach() for p in self.model.parameters()]).item(),
            "train/images_per_s": self.window.images / seconds,
            "train/rank_images_per_s": self.window.images / seconds / self.world.world_size,
            "time/step_s": seconds / steps,
            "time/data_s": phases["data"],
            "time/forward_s": phases["forward"],
            "time/backward_s": phases["backward"],
            "time/optimizer_s": phases["optimizer"],
            "run/peak_memory_mb": peak_memory(self.world.device) / 1e6,
        }
        if (rate := effective_lr(self.optimizer)) is not None:
            scalars["train/effective_lr"] = rate
        if self.own_us:
            scalars |= {"time/slowest_rank_s": max(self.own_us) / 1e6, "time/fastest_rank_s": min(self.own_us) / 1e6}
        self.tracker.log(scalars | self._survival(), progress.step)
        self.window = Span()

    def take_fingerprint(self) -> str:
        """The fingerprint of the weights, in hexadecimal; at the next exchange ranks compare theirs."""
        value = fingerprint(self.model)
        self.report = self.report._replace(fingerprint=value)
        return f"{value:016x}"

    def log_fingerprint(self) -> None:
        """A row with the fingerprint alone, and a line of the terminal."""
        text = self.take_fingerprint()
        self.tracker.log({"fingerprint": text}, self.progress.step)
        log.info(f"step {self.progress.step}: fingerprint {text}")

    # -- an evaluation

    @torch.inference_mode()
    def evaluate(self, loader: EvalLoader, *, augmented: bool = False, logits: Tensor | None = None) -> Totals:
        """Loss and accuracy over all images of a split, each counted once, whatever the number of ranks.

        Of the averaged weights, where `train.ema_decay` keeps some.
        `augmented`, for the training split: over crops and mirrors of their own, drawn for the current epoch.
        `logits`, (N, classes) zeros on the device, gets those of the images that this rank evaluates.
        """
        augmentations = None
        if augmented:
            assert isinstance(loader, TrainLoader)
            augmentations = loader.augmentations(self.progress.epoch, purpose="augment for the training accuracy")
        self.evaluated.eval()
        forward = forward_pass(self.evaluated, self.precision, self.world.device)
        counter = Counter(self.world.device)
        for found in count_batches(forward, loader, counter, self.world, self.config.eval.batch_size, augmentations):
            if logits is not None:
                put_in_place(logits, found)
            self.poll()
        totals = counter.reduce(self.world)
        if totals.images != len(loader):
            raise RunError(f"the evaluation counted {totals.images} images of {len(loader)}")
        return totals

    @property
    def _shown(self) -> tuple[str, EvalLoader] | None:
        """The split of TensorBoard's pictures."""
        splits = {"test": self.test, "val": self.val}
        return next(((name, loader) for name, loader in splits.items() if loader and self.classes), None)

    def _logits_to_show(self, name: str, is_last: bool) -> Tensor | None:
        """Zeros for the logits of the split `name`, where this evaluation has pictures of it."""
        every, shown = self.config.tracking.pictures_every, self._shown
        is_due = every is not None and (is_last or (self.progress.epoch + 1) % every == 0)
        if not (is_due and shown and shown[0] == name and len(shown[1]) * len(self.classes) <= MOST_LOGITS):
            return None
        return torch.zeros(len(shown[1]), len(self.classes), device=self.world.device)

    def _show(self, logits: Tensor) -> None:
        """Have TensorBoard show what the network makes of the split that `logits` are of."""
        assert self._shown
        name, loader = self._shown
        for add in (dashboard.add_confusion, dashboard.add_wrong_images, dashboard.add_curves):
            add_it = functools.partial(
                add, name=name, split=loader.split, logits=logits, classes=self.classes, step=self.progress.step
            )
            self.tracker.show(add_it)

    # -- what ranks tell each other

    def _say(self) -> Report:
        """This rank's report."""
        minutes = self.config.checkpoint.every_minutes
        due = minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes
        if due:
            self.saved_at = time.perf_counter()  # once: the save itself comes at the next exchange
        save = self.requests.take_save() or (due and self.world.is_main)
        reason = REASONS.index(self.requests.reason)
        return self.report._replace(reason=reason, save=int(save))

    def _compare_replicas(self, everyone: list[Report]) -> None:
        """Raise if ranks hold unlike weights."""
        prints = [report.fingerprint for report in everyone]
        if len(set(prints)) > 1:
            common = max(prints, key=prints.count)
            others = ", ".join(f"rank {rank}" for rank, value in enumerate(prints) if value != common)
            self._fail(f"the weights of {others} are not those of the other ranks, by step {self.progress.step}")

    def _look_for_stragglers(self, everyone: list[Report]) -> None:
        """Warn, once a rank, of one whose own work took far longer than the others' in the same steps."""
        factor = self.config.train.straggler_factor
        if factor is None or self.world.world_size == 1 or len({report.window for report in everyone}) > 1:
            return
        window = everyone[0].window
        for rank, report in enumerate(everyone):
            others = statistics.median(other.own_us for i, other in enumerate(everyone) if i != rank)
            if report.own_us <= max(factor * others, others + STRAGGLER_FLOOR_US):
                self.slow_since.pop(rank, None)
            elif self.slow_since.setdefault(rank, window) < window and rank not in self.reported:
                # in two windows one after another: in one, anything may have come between
                self.reported.add(rank)
                if rank == self.world.rank:
                    log.warning(
                        f"this rank, on {socket.gethostname()}, is slow: to step {report.window} a step took it "
                        f"{report.own_us / 1000:.1f} ms of its own work ({report.data_us / 1000:.1f} ms of it for data), "
                        f"the other ranks {others / 1000:.1f} ms; all wait for it"
                    )

    # -- what can go wrong

    def _settle_sums(self) -> None:
        """Count what ranks have computed since the last call to the window; raises if some of it is not finite.

        Waits for the device; every rank must call it.
        """
        if self.norms:
            self._check_gradients(torch.stack(self.norms).tolist())
            self.norms.clear()
        new = self.counter.reduce(self.world)
        self.progress.window += new
        self._check_losses(new)

    def _check_gradients(self, norms: list[float]) -> None:
        """Raise if one of the last steps' gradients, of which these are the norms, is not finite."""
        self.last_norm = norms[-1]
        bad = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        # a scaled fp16 gradient overflows now and then, and the scaler leaves its update out
        if bad and self.config.train.on_nonfinite == "stop" and not self.scaler.is_enabled():
            first = self.progress.step - len(norms) + 1
            self._fail(
                f"the gradient of step {first + bad[0]} is not finite ({norms[bad[0]]}), {len(bad)} of those of steps "
                f"{first} to {self.progress.step} are not"
            )

    def _check_losses(self, new: Totals) -> None:
        """Raise if the loss of one of the last images is not finite."""
        if new.nonfinite and self.config.train.on_nonfinite == "stop":
            where = self.world.gather([self.counter.own_nonfinite()])
            ranks = ", ".join(f"{count} on rank {rank}" for rank, (count,) in enumerate(where) if count)
            self._fail(f"the loss of {new.nonfinite} images is not finite, by step {self.progress.step} ({ranks})")

    def _check_ledger(self, totals: Totals) -> None:
        """Raise unless the epoch's images were each counted once."""
        if (totals.images, totals.ledger) != (len(self.train), self.all_images):
            self._fail(
                f"the ledger of epoch {self.progress.epoch + 1} does not balance: {totals.images} images with the sum "
                f"{totals.ledger:016x} were trained on, expected each of {len(self.train)} once, {self.all_images:016x}"
            )

    def _fail(self, what: str) -> NoReturn:
        """End the run, on all ranks alike: every one of them must call it."""

        def last_good() -> str | None:
            self._finish_saves()
            return str(self.checkpoints.last_good) if self.checkpoints.last_good else None

        saved = self.world.on_main(last_good)
        raise RunError(
            f"{what}; " + (f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet")
        )

    def _out_of_memory(self) -> str:
        """The error of one line, with the largest micro-batch size that a trial shows to fit."""
        plan = self.plan
        smaller = [
            size
            for size in range(plan.micro_batch_size - 1, 0, -1)
            if plan.global_batch_size % size == 0
            and plan.global_batch_size // size % plan.world_size == 0
            and (self.tree is None or is_power_of_two(plan.global_batch_size // size))
        ]
        fits = next((size for size in smaller if self._fits(size)), None)
        advice = f"{fits} would fit" if fits else "no smaller one fits either, use a GPU with more memory"
        return f"the memory of {self.world.device} ran out at train.micro_batch_size={plan.micro_batch_size}: {advice}"

    def _fits(self, size: int) -> bool:
        """True if there is memory for a micro-batch of `size` images."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            images = torch.zeros(size, *self.train.image_shape, device=self.world.device)
            with self.autocast():
                logits = self.model(images.to(memory_format=self.train.memory_format))
            # not `backward`, which would have DDP wait for the other ranks
            torch.autograd.grad(logits.float().sum(), list(self.model.parameters()))
        except torch.OutOfMemoryError:
            return False
        return True

    # -- insides

    def _finish_saves(self, patience_s: float = math.inf) -> None:
        """Wait until what was saved is on the disk, but no longer than `patience_s`; it does not count as a hang."""
        deadline = time.perf_counter() + patience_s
        while not self.checkpoints.finish(timeout_s=0.5) and time.perf_counter() < deadline:
            self.heartbeat.beat(self.progress.step)

    def _survival(self) -> dict[str, float | str]:
        """What the run went through, with the share of its processes' time that advanced it."""
        if not self.start:
            return {}
        occupied_s = self.start.occupied_s + time.time() - self.start.time
        productive_s = self.start.productive_s + time.perf_counter() - self.resumed_at - self.waiting_s
        return {
            "run/restarts": self.start.restarts,
            "run/steps_lost": self.start.steps_lost,
            "run/productive_s": productive_s,
            "run/goodput": productive_s / occupied_s,
        }

    def _settle_buckets(self) -> None:
        """One backward pass thrown away, after which DDP has its final buckets.

        DDP regroups gradients into other buckets after the first backward of a process. The order in which gloo sums
        an element depends on its place in a bucket, so the first step after a resume would round in another way than
        the same step of an unbroken run.
        """
        self._warm_up(2)

    def _warm_up(self, num_images: int) -> None:
        """A forward and backward pass over so many images, as in training, which leaves nothing changed."""
        kept = [buffer.clone() for buffer in self.model.buffers()]
        images = torch.zeros(num_images, *self.train.image_shape, device=self.world.device)
        images = images.to(memory_format=self.train.memory_format)
        self.model.train()
        self._logits(images).float().sum().backward()
        if self.tree:
            self.tree.end_micro_batch(is_last=True)
        self._zero_grad()
        _restore(self.model.buffers(), kept)

    def _zero_grad(self) -> None:
        """Compiled, gradients stay where they are, in DDP's buckets: a CUDA graph would overwrite those that it has made."""
        self.optimizer.zero_grad(set_to_none=self.config.train.compile == "off")

    def _compile(self, mode: str) -> None:
        """Have torch.compile make kernels of the network, for training and evaluation, and of the augmentation."""
        # within DDP, which then cuts the backward graph at its buckets, so that gradients leave as they are ready
        for network in (self.model, self.evaluated):
            network.compile(mode=mode, dynamic=False)
        for loader in (self.train, self.val, self.test):
            if loader:
                loader.transform = torch.compile(transform, dynamic=False)

    def _warm_up_compiled(self) -> None:
        """Compile, and record CUDA graphs, for each size of micro-batch that an epoch has, on all ranks alike."""
        started = time.perf_counter()
        plan = self.plan
        sizes = plan.micro_batch_sizes()
        split = self.train.split
        unchanged = torch.zeros(len(split.images), 3, dtype=torch.int32, device=split.images.device)
        for size in sizes:  # the usual one first
            for _ in range(COMPILED_WARM_UP):
                self.train.gather(torch.arange(size), unchanged)
                self._warm_up(size)
        log.info(
            f"compiled for micro-batches of {', '.join(map(str, sizes))} images in "
            f"{time.perf_counter() - started:.1f} s, which counts for no throughput"
        )


@torch.no_grad()
def _restore(tensors: Iterable[Tensor], kept: Sequence[Tensor]) -> None:
    for tensor, before in zip(tensors, kept, strict=True):
        tensor.copy_(before)


def _epoch_line(scalars: Scalars, note: str) -> str:
    """The article's four fields, and the speed."""
    values = {tag: float(value) for tag, value in scalars.items() if not isinstance(value, str)}
    parts = [f"Iteration: {values['train/epoch']:.0f}{note}", f"Loss: {values['train/epoch_loss']:.4f}"]
    names = {"train/accuracy": "Training", "val/accuracy": "Validation", "test/accuracy": "Test"}
    parts += [f"{name} accuracy: {100 * values[tag]:.2f}%" for tag, name in names.items() if tag in values]
    seconds = f"{values['time/epoch_s']:.1f} s"
    if "time/evaluation_s" in values:
        seconds += f" + {values['time/evaluation_s']:.1f} s evaluation"
    if "train/epoch_images_per_s" in values:
        parts.append(f"{values['train/epoch_images_per_s']:.0f} images/s")
    return " | ".join([*parts, seconds, f"fingerprint {scalars['fingerprint']}"])
