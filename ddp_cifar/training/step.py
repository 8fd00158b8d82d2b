"""One update of the weights: this rank's forward and backward passes, the all-reduce of gradients, the optimizer.

Each step has a fixed split of its global batch into micro-batches, which are divided among ranks. The loss of a micro-batch is
the sum over its images, divided by the number of images in the global batch. So the gradients add up to those of the mean loss,
also in a short last batch.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddp_cifar.config import Config, ImageShape
from ddp_cifar.data.batch_plan import BatchPlan
from ddp_cifar.data.loader import MicroBatch, StepBatch
from ddp_cifar.distributed.world import World, check_reduced
from ddp_cifar.errors import UserError
from ddp_cifar.models.weights import load_weights
from ddp_cifar.run.checkpoint_file import State
from ddp_cifar.seeding import seed_dropout
from ddp_cifar.training.buffers import BufferMean, sum_rows
from ddp_cifar.training.loss import TrainingLoss
from ddp_cifar.training.metrics import TrainMetrics
from ddp_cifar.training.nonfinite import NormCheck, first_nonfinite
from ddp_cifar.training.optim import averages_weights, effective_lr, load_optimizer_state, start_training
from ddp_cifar.training.parameters import restore
from ddp_cifar.training.precision import autocast
from ddp_cifar.training.schedule import Schedule
from ddp_cifar.training.tree_sum import TreeReduction


class TrainStep:
    """Makes the updates, and owns all that they change: the weights, the optimizer's state and the averaged weights.

    Every rank has one, with an equal model and optimizer, and calls it equally often.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        plan: BatchPlan,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: TrainingLoss,
        precision: str,
        image_shape: ImageShape,
    ) -> None:
        """`image_shape`: (C, H, W). `precision`: fp32, tf32, bf16 or fp16.

        Raises `UserError` if the device does not support the config.
        """
        self.config = config
        self.world = world
        self.plan = plan
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.precision = precision
        self.image_shape = image_shape
        self.ddp = world.wrap(model, config.comm.bucket_mb, config.comm.hook)
        self.tree: TreeReduction | None = None
        if config.train.reproducible:
            if not isinstance(self.ddp, DistributedDataParallel):
                raise UserError(
                    f"train.reproducible=true needs device cpu or cuda, found {world.device.type}; use another device or "
                    f"train.reproducible=false"
                )
            self.tree = TreeReduction(world, self.ddp)
        self.buffers = BufferMean(model, plan.num_micro_batches, self.tree.sum_async if self.tree else sum_rows(world))
        self.schedule = Schedule(
            optimizer, config.optim, steps_per_epoch=plan.steps_per_epoch, epochs=config.train.epochs
        )
        # a GPU runs later than its host: without the wait, an update would be queued behind a collective that fails
        self.waits_for_sums = config.checkpoint.on_failure and world.device.type == "cuda" and world.world_size > 1
        self.step = 0
        """The number of completed steps before the current one."""
        self.lr = 0.0
        """The learning rate of the last update."""
        self.batch: Iterable[MicroBatch] = ()  # of the current step
        self.around_pass: Callable[[MicroBatch], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        # with fp16, a scaled gradient may overflow
        self.norm_check = NormCheck(config.train, world, enabled=precision != "fp16", waits=self.waits_for_sums)
        # scales the loss so that small fp16 gradients do not vanish, and skips updates that overflow
        self.scaler = GradScaler(world.device.type, enabled=precision == "fp16")
        self.ema: AveragedModel | None = None
        if config.train.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.train.ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
            if averages_weights(optimizer):
                raise UserError(
                    f"train.ema_decay={config.train.ema_decay} with optim.name={config.optim.name}, which averages the weights "
                    f"itself: use one of them"
                )
        self.eval_model: nn.Module = self.ema.module if self.ema else model
        """The model to evaluate: with the averaged weights, if the run has them."""
        self.trained: list[Tensor] = []
        """The weights of training, while `evaluating` has replaced them."""
        start_training(optimizer)

    def gradients(self, batch: StepBatch, step: int, metrics: TrainMetrics) -> Tensor:
        """Compute the gradients of the step after `step` completed ones from this rank's micro-batches, and sum them over ranks.

        Returns () float32, on the device: the gradient's norm before clipping. `metrics` counts losses and times. The step's sums
        over ranks are here: if one of them fails, weights and optimizer state are those of the last step.
        """
        self.step, self.batch = step, batch
        # DDP divides the sum over ranks by their number, but num_images is a total over ranks; the tree does not divide
        self.loss_scale = (1 if self.tree else self.world.world_size) / batch.num_images
        self.begin(self.plan.shares(batch.num_images))
        self.zero_grad()
        last = len(batch) - 1
        for position, micro_batch in enumerate(metrics.timer.timed("data", batch)):
            # ranks exchange gradients once per step, in the last micro-batch's backward
            with contextlib.nullcontext() if position == last else self.ddp.no_sync(), self.around_pass(micro_batch):
                self.forward_backward(micro_batch, batch.num_images, step, metrics, is_last=position == last)
        if not batch:
            self.join_exchange(metrics)
        check_reduced(self.ddp, step + 1)
        if self.tree:
            self.tree.end_step()
        if self.waits_for_sums:
            torch.cuda.current_stream().synchronize()
        with metrics.timer.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def begin(self, shares: Sequence[range]) -> None:
        """Prepare a step. `shares` has the micro-batches of each rank. Call it before the first pass."""
        self.buffers.begin_step(shares[-1].stop)
        if self.tree:
            self.tree.begin_step(shares)

    def forward_backward(
        self, micro_batch: MicroBatch, step_images: int, step: int, metrics: TrainMetrics, *, is_last: bool
    ) -> None:
        """Add the gradients of a micro-batch to a step that has `step_images` images on all ranks together."""
        with metrics.timer.phase("forward"):
            # dropout depends on the micro-batch's position in the run, so that it is the same on every rank
            seed_dropout(self.world.device, self.config.seed, step, micro_batch.index)
            self.buffers.begin_micro_batch()
            logits = self.logits(micro_batch.images)
            losses = self.loss(logits.float(), micro_batch.targets)
            self.buffers.end_micro_batch(micro_batch.index, weight=len(losses) / step_images)
            metrics.counter.add(losses.detach(), logits.detach(), micro_batch.labels, micro_batch.sample_ids)
        with metrics.timer.phase("backward"):  # includes the wait for other ranks
            finish_sums = self.start_reducing(metrics) if is_last else None
            loss = losses.sum() * self.loss_scale
            self.scaler.scale(loss).backward()
            if finish_sums:
                finish_sums()
            if self.tree:
                self.tree.end_micro_batch(micro_batch.index)

    def join_exchange(self, metrics: TrainMetrics) -> None:
        """Take part in the all-reduce of a step in which this rank has no images.

        DDP all-reduces gradients in a backward pass. This one is of a single image, with gradients of zero.
        """
        with metrics.timer.phase("forward"):
            self.buffers.begin_micro_batch()
            logits = self.logits(self.trial_images(1))
        with metrics.timer.phase("backward"):
            finish_sums = self.start_reducing(metrics)
            self.scaler.scale(0 * logits.float().sum()).backward()
            finish_sums()

    def start_reducing(self, metrics: TrainMetrics) -> Callable[[], None]:
        """Start summing buffers and counts over ranks, beside the gradients; return a function that waits for the sums."""
        set_buffers, add_counts = self.buffers.start_reducing(), metrics.counter.start_reducing(self.world)

        def finish() -> None:
            set_buffers()
            add_counts()

        return finish

    def update(self, norm: Tensor, metrics: TrainMetrics) -> bool:
        """Update the weights with the gradients of the step, whose norm is `norm`.

        Returns False if `train.on_nonfinite=skip` skips the update. An update that the fp16 scaler skips counts as True. Raises
        `Failed` on every rank if the norm is not finite and the run has to stop, unless it is only found later.
        """
        self.lr = self.schedule.before_step(self.step)
        gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
        updates = self.norm_check.allows_update(norm, self.step + 1, self.replay, gradients)
        with metrics.timer.phase("optimizer"):
            if updates:
                self._update(norm)
            else:
                self.buffers.undo_step()
            self.buffers.end_step()
        return updates

    def replay(self) -> Iterator[str]:
        """Run the micro-batches of the step again, bitwise the same unless compiled; yield which layer is not finite, or ""."""
        for batch in self.batch:
            seed_dropout(self.world.device, self.config.seed, self.step, batch.index)
            self.buffers.undo_step()
            loss = functools.partial(self.loss, targets=batch.targets)
            text = first_nonfinite(self.model, batch.images, loss, self.loss_scale, self.autocast())
            yield f"{text}, in micro-batch {batch.index + 1} on rank {self.world.rank}" if text else ""

    def _update(self, norm: Tensor) -> None:
        if self.config.train.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.train.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():  # an update that it skips must leave no trace in the buffers either
            self.buffers.undo_step(unless=norm.isfinite())
        if self.ema:
            self.ema.update_parameters(self.model)
            for average, buffer in zip(self.ema.module.buffers(), self.model.buffers(), strict=True):
                if not buffer.is_floating_point():
                    average.copy_(buffer)  # counts are not averaged

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, classes), through DDP."""
        if self.config.train.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last pass's CUDA graphs are no longer needed
        with self.autocast():
            logits: Tensor = self.ddp(images)
        return logits

    def autocast(self) -> torch.autocast:
        """Return the context for the precision of forward passes."""
        return autocast(self.precision, self.world.device)

    def zero_grad(self) -> None:
        """Reset the gradients.

        With compile, keep the tensors in DDP's buckets: a CUDA graph would overwrite gradients that it allocated.
        """
        self.optimizer.zero_grad(set_to_none=self.config.train.compile == "off")

    def trial_images(self, num_images: int) -> Tensor:
        """Return (B, C, H, W) images for dummy passes. They are ramps, since a model may divide by an image's contrast."""
        image = torch.linspace(-1, 1, math.prod(self.image_shape), device=self.world.device).view(self.image_shape)
        channels_last = self.config.train.channels_last
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return image.repeat(num_images, 1, 1, 1).to(memory_format=memory_format)

    def scalars(self) -> dict[str, float]:
        """Return the learning rate and the norm of the weights. Waits for the device."""
        weights = nn.utils.get_total_norm([p.detach() for p in self.model.parameters()])
        scalars = {"train/lr": self.lr, "train/weight_norm": weights.item()}
        if (effective := effective_lr(self.optimizer)) is not None:
            scalars["train/effective_lr"] = effective
        return scalars

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In the body, the model has the weights to evaluate, if its optimizer averages them. Bitwise undone afterwards."""
        if not averages_weights(self.optimizer):
            yield
            return
        self.trained = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.stop_evaluating()

    def stop_evaluating(self) -> None:
        """Put the weights of training back, if `evaluating` has replaced them."""
        if self.trained:
            start_training(self.optimizer)
            restore(self.model.parameters(), self.trained)
            self.trained = []

    def state_dict(self) -> State:
        """Return `model` and `optimizer`; also `ema` (averaged weights, which are evaluated) and `scaler` if the run has them."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema:
            state["ema"] = self.ema.module.state_dict()
        if averages_weights(self.optimizer):
            with self.evaluating():
                state["ema"] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: State, source: str, updates: int) -> None:
        """Load a state made by `updates` updates. Raises `UserError`, which names `source`, if it does not fit."""
        load_weights(self.model, state["model"], source)
        self.buffers.end_step()
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.ema:
            load_weights(self.ema.module, state["ema"], source)
            self.ema.n_averaged.fill_(updates)  # at 0, the next update would overwrite the average
        if "scaler" in state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
