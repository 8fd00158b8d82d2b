"""The training loop: what happens in a step, in an epoch, and in a run.

A step's global batch is cut into micro-batches in a fixed way, and ranks only share them out. The loss of each is a sum over
images divided by the images of the global batch, so that gradients add up to the mean's, short last batch included.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ddp_cifar.buffers import BufferMean
from ddp_cifar.checkpoint import Checkpoints, State, load_weights
from ddp_cifar.config import Config, TrainConfig, to_dict
from ddp_cifar.data.loader import EvalLoader, MicroBatch, StepBatch, TrainLoader
from ddp_cifar.distributed import World
from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.metrics import Counter, PhaseTimer, Span, Totals
from ddp_cifar.optim import Schedule, load_optimizer_state
from ddp_cifar.seeding import seed_dropout
from ddp_cifar.tracking import NullTracker, Tracker


@dataclass
class Progress:
    """How far a run is. With the config and the weights, all that it takes to go on."""

    epoch: int = 0
    """Epochs completed."""
    step_in_epoch: int = 0
    """Steps completed of the epoch that is under way."""
    step: int = 0
    """Steps completed in the run."""
    train: Totals = dataclasses.field(default_factory=Totals)
    """Over the images of the epoch that is under way, as they were trained on."""
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    """The scalars of the last evaluation, such as `test/accuracy`."""
    best_val_accuracy: float = -1.0
    data: str = ""
    """What the run trains on, in words and a checksum of the labels: steps and sample ids mean nothing with other data."""
    conditions: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the results depend on, but the config does not say: derived from the hardware and the number of ranks."""

    def is_finished(self, train: TrainConfig) -> bool:
        """True where `train` asks for no step more."""
        return self.epoch >= train.epochs or (train.max_steps is not None and self.step >= train.max_steps)

    def state_dict(self) -> State:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, Totals(**value) if name == "train" else value)

    def __str__(self) -> str:
        names = {"train/accuracy": "training", "val/accuracy": "validation", "test/accuracy": "test"}
        accuracies = [
            f"{name} accuracy {100 * self.results[tag]:.2f}%" for tag, name in names.items() if tag in self.results
        ]
        return ", ".join([f"epoch {self.epoch}, step {self.step}", *accuracies])


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
        show_progress: bool = False,
    ) -> None:
        self.config = config
        self.world = world
        self.plan = train.sampler.plan
        self.model = model
        self.ddp = world.wrap(model)
        self.optimizer = optimizer
        self.schedule = Schedule(
            optimizer, config.optim, steps_per_epoch=self.plan.steps_per_epoch, epochs=config.train.epochs
        )
        self.train, self.test, self.val = train, test, val
        self.checkpoints = checkpoints
        self.precision = precision
        # multiplies the loss so that small fp16 gradients do not vanish, and leaves out an update that overflowed
        self.scaler = GradScaler(world.device.type, enabled=precision == "fp16")
        self.ema: AveragedModel | None = None
        if config.train.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.train.ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.show_progress = show_progress

        conditions = {"precision": precision, "micro-batches a step": str(self.plan.num_micro_batches)}
        self.progress = Progress(data=data, conditions=conditions)
        self.last_step = self.schedule.total_steps
        if config.train.max_steps is not None:
            self.last_step = min(self.last_step, config.train.max_steps)
        self.buffers = BufferMean(model, world, self.plan.num_micro_batches)
        self.counter = Counter(world.device)
        self.timer = PhaseTimer(world.device)
        self.epoch, self.window = Span(), Span()
        self._settle_buckets()

    # -- a run

    def fit(self, tracker: Tracker | None = None) -> None:
        """Train from where `progress` is to the last step; `tracker` gets the scalars."""
        self.tracker = tracker or NullTracker()
        while self.progress.step < self.last_step:
            self.train_epoch()
            self.finish_epoch()

    def state_dict(self) -> State:
        """All that a run needs to go on: plain dicts, lists, tensors, numbers and strings."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress.state_dict(),
            "config": to_dict(self.config),
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
            self.ema.n_averaged.fill_(before.step)  # what is 0 is overwritten by the next weights
        if "scaler" in state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        before.conditions = now.conditions
        self.progress = before

    # -- an epoch

    def train_epoch(self) -> None:
        """Train to the epoch's end, or to the run's last step where that comes first."""
        progress, log_every = self.progress, self.config.train.log_every
        steps = min(self.plan.steps_per_epoch, progress.step_in_epoch + self.last_step - progress.step)
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
                self.train_step(next(batches))
                bar.update()
                if progress.step % log_every == 0:
                    self.log_window()
        progress.train += self.counter.reduce(self.world)
        self.epoch_seconds = self.epoch.seconds
        self.timer.read()

    def finish_epoch(self) -> None:
        """Evaluate, print the article's line, and save, each when it is due."""
        config, progress = self.config, self.progress
        ended = progress.step_in_epoch == self.plan.steps_per_epoch
        is_last = progress.step == self.last_step
        number = progress.epoch + 1

        scalars = {"train/epoch": number, "train/epoch_loss": progress.train.mean_loss}
        scalars["train/epoch_images_per_s"] = self.epoch.images / self.epoch_seconds
        scalars["time/epoch_s"] = self.epoch_seconds
        evaluated = is_last or number % config.eval.every == 0
        is_best = False
        if evaluated:
            started = time.perf_counter()
            progress.results = {"train/accuracy": progress.train.accuracy}
            if config.eval.train_accuracy == "full":
                progress.results["train/accuracy"] = self.evaluate(self.train, augmented=True).accuracy
            for name, loader in (("val", self.val), ("test", self.test)):
                if loader is not None:
                    totals = self.evaluate(loader)
                    progress.results |= {f"{name}/loss": totals.mean_loss, f"{name}/accuracy": totals.accuracy}
            scalars |= progress.results | {"time/evaluation_s": time.perf_counter() - started}
            val_accuracy = progress.results.get("val/accuracy", -1.0)
            is_best = val_accuracy > progress.best_val_accuracy
            progress.best_val_accuracy = max(val_accuracy, progress.best_val_accuracy)
        self.tracker.log(scalars, progress.step)
        log.info(_epoch_line(scalars, "" if ended else f" (to step {progress.step})"))

        if ended:
            progress.epoch += 1
            progress.step_in_epoch = 0
            progress.train = Totals()
        if is_last or is_best or number % config.checkpoint.every_epochs == 0:
            self.checkpoints.save(self.state_dict(), progress.step, is_best)

    # -- a step

    def train_step(self, batch: StepBatch) -> None:
        """One update from this rank's micro-batches of the step."""
        self.lr = self.schedule.before_step(self.progress.step)
        self.buffers.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        last = len(batch) - 1
        for position, micro_batch in enumerate(self.timer.timed("data", batch)):
            # ranks exchange gradients once a step, in the last micro-batch's backward
            with self.timer.phase("compute"), contextlib.nullcontext() if position == last else self.ddp.no_sync():
                self.forward_backward(micro_batch, batch.num_images, is_last=position == last)
        with self.timer.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            if self.config.train.clip_norm is not None:
                self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update_parameters(self.model)
                for average, buffer in zip(self.ema.module.buffers(), self.model.buffers(), strict=True):
                    if not buffer.is_floating_point():
                        average.copy_(buffer)  # a count has no average
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        for span in (self.epoch, self.window):
            span.steps += 1
            span.images += batch.num_images

    def forward_backward(self, micro_batch: MicroBatch, step_images: int, *, is_last: bool) -> None:
        """Add a micro-batch's part to the gradients of a step that has `step_images` images over all ranks."""
        # dropout by the micro-batch's place in the run, so that it is the same on whatever rank
        seed_dropout(self.world.device, self.config.seed, self.progress.step, micro_batch.index)
        self.buffers.begin_micro_batch()
        with self.autocast():
            logits = self.ddp(micro_batch.images)
        smoothing = self.config.train.label_smoothing
        losses = F.cross_entropy(logits.float(), micro_batch.labels, reduction="none", label_smoothing=smoothing)
        self.buffers.end_micro_batch(weight=len(losses) / step_images)
        set_buffers = self.buffers.start_reducing() if is_last else None
        # DDP divides the sum over ranks by their number, which here is in step_images already
        loss = losses.sum() * (self.world.world_size / step_images)
        self.scaler.scale(loss).backward()
        self.counter.add(losses.detach(), logits.detach(), micro_batch.labels)
        if set_buffers:
            set_buffers()

    def autocast(self) -> torch.autocast:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None)

    def log_window(self) -> None:
        """A row of scalars over the steps since the last one, or since the epoch's start."""
        norm = self.grad_norm if self.config.train.clip_norm is not None else self._grad_norm()
        totals = self.counter.reduce(self.world)
        self.progress.train += totals
        seconds, steps = self.window.seconds, self.window.steps
        phases = self.timer.read()
        scalars = {
            "train/loss": totals.mean_loss,
            "train/batch_accuracy": totals.accuracy,
            "train/lr": self.lr,
            "train/grad_norm": float(norm),
            "train/images_per_s": self.window.images / seconds,
            "time/step_s": seconds / steps,
            "time/data_s": phases["data"] / steps,
            "time/forward_backward_s": phases["compute"] / steps,
            "time/optimizer_s": phases["optimizer"] / steps,
        }
        self.tracker.log(scalars, self.progress.step)
        self.window = Span()

    # -- an evaluation

    @torch.inference_mode()
    def evaluate(self, loader: EvalLoader, *, augmented: bool = False) -> Totals:
        """Loss and accuracy over all images of a split, each counted once, whatever the number of ranks.

        Of the averaged weights, where `train.ema_decay` keeps some.
        `augmented`, for the training split: over crops and mirrors of their own, drawn for the current epoch.
        """
        augmentations = None
        if augmented:
            assert isinstance(loader, TrainLoader)
            augmentations = loader.augmentations(self.progress.epoch, purpose="augment for the training accuracy")
        model = self.ema.module if self.ema else self.model
        model.eval()
        counter = Counter(self.world.device)
        for images, labels in loader.evaluation_batches(self.world, self.config.eval.batch_size, augmentations):
            with self.autocast():
                logits = model(images)
            counter.add(F.cross_entropy(logits.float(), labels, reduction="none"), logits, labels)
        totals = counter.reduce(self.world)
        if totals.images != len(loader):
            raise RuntimeError(f"evaluation counted {totals.images} images of {len(loader)}")
        return totals

    # -- insides

    def _grad_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _settle_buckets(self) -> None:
        """One backward pass thrown away, after which DDP has its final buckets.

        DDP regroups gradients into other buckets after the first backward of a process. The order in which gloo sums
        an element depends on its place in a bucket, so the first step after a resume would round in another way than
        the same step of an unbroken run.
        """
        kept = [buffer.clone() for buffer in self.model.buffers()]
        images = torch.zeros(2, *self.train.image_shape, device=self.world.device)
        images = images.to(memory_format=self.train.memory_format)
        self.model.train()
        with self.autocast():
            logits = self.ddp(images)
        logits.float().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(before)


def _epoch_line(scalars: Mapping[str, float], note: str) -> str:
    """The article's four fields, and the speed."""
    parts = [f"Iteration: {scalars['train/epoch']:.0f}{note}", f"Loss: {scalars['train/epoch_loss']:.4f}"]
    names = {"train/accuracy": "Training", "val/accuracy": "Validation", "test/accuracy": "Test"}
    parts += [f"{name} accuracy: {100 * scalars[tag]:.2f}%" for tag, name in names.items() if tag in scalars]
    seconds = f"{scalars['time/epoch_s']:.1f} s"
    if "time/evaluation_s" in scalars:
        seconds += f" + {scalars['time/evaluation_s']:.1f} s evaluation"
    return " | ".join([*parts, f"{scalars['train/epoch_images_per_s']:.0f} images/s", seconds])
