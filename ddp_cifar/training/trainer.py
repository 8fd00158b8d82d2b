"""The training loop: a run, its epochs, and what all ranks do at the same step."""

import math
import time
from collections.abc import Sequence

from ddp_cifar.config import Config, to_dict
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.data.loader import TrainLoader
from ddp_cifar.data.normalization import normalization_of
from ddp_cifar.distributed.world import World
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import State
from ddp_cifar.run.checkpoint_store import Checkpoints
from ddp_cifar.run.goodput import Goodput
from ddp_cifar.run.heartbeat import Heartbeat, NullHeartbeat
from ddp_cifar.run.run_dir import Start
from ddp_cifar.run.stopping import Requests
from ddp_cifar.tracking.base import TIME, NullTracker, Scalars, Tracker
from ddp_cifar.tracking.dashboard import Dashboard
from ddp_cifar.training.evaluation import Evaluator
from ddp_cifar.training.fingerprint import fingerprint
from ddp_cifar.training.metrics import TrainMetrics, epoch_line
from ddp_cifar.training.profiling import NullProfiler
from ddp_cifar.training.progress import Failed, Progress, Stopped, due
from ddp_cifar.training.rank_exchange import RankExchange
from ddp_cifar.training.step import TrainStep
from ddp_cifar.training.survivor import Survivor
from ddp_cifar.training.verification import Verifier
from ddp_cifar.training.warmup import memory_advice

SAVE_TIMEOUT_S = 60.0
"""The longest wait for an earlier save. If the disk is slower, checkpoints are skipped and training continues."""


class Trainer:
    """Trains on every rank of `world`. The caller (`build_trainer`) builds the components, which are equal on all ranks."""

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        progress: Progress,
        train_step: TrainStep,
        train_loader: TrainLoader,
        evaluator: Evaluator,
        dataset: DataSet,
        checkpoints: Checkpoints,
        show_progress: bool = False,
    ) -> None:
        self.config = config
        self.world = world
        self.plan = train_step.plan
        self.progress = progress
        self.train_step = train_step
        self.model = train_step.model
        self.train_loader = train_loader
        self.evaluator = evaluator
        self.checkpoints = checkpoints
        self.dataset = dataset
        self.show_progress = show_progress
        stops = config.train.on_nonfinite == "stop"
        # a scaled fp16 gradient may overflow; the scaler then skips the update
        finite = stops and not train_step.scaler.is_enabled()
        self.metrics = TrainMetrics(world, progress, train_loader, finite_losses=stops, finite_gradients=finite)
        self.ranks = RankExchange(world, config)
        self.last_step = train_step.schedule.total_steps
        """The step at which `train_epoch` stops. `fit` uses the config's; a benchmark, which calls `train_epoch`, changes it."""
        if config.train.max_steps is not None:
            self.last_step = min(self.last_step, config.train.max_steps)
        self.verifier = Verifier(config.train, world, train_step, train_loader, checkpoints.verify)
        self.save_due = False
        saves = config.checkpoint.on_failure
        self.survivor = Survivor(world, train_step, self.metrics, checkpoints, self.state_dict, enabled=saves)
        self.log_to(NullTracker())
        self.heartbeat: Heartbeat | NullHeartbeat = NullHeartbeat()
        self.profiler: NullProfiler = NullProfiler()
        self.goodput: Goodput | None = None

    def log_to(self, tracker: Tracker) -> None:
        """Use `tracker` from now on."""
        self.tracker = tracker
        self.dashboard = Dashboard(tracker, self.config, self.dataset)

    def fit(
        self,
        tracker: Tracker | None = None,
        requests: Requests | None = None,
        heartbeat: Heartbeat | None = None,
        start: Start | None = None,
        profiler: NullProfiler | None = None,
    ) -> str:
        """Train from `progress` to the last step, or until ranks agree to stop; return the reason, or "" if finished.

        `tracker` receives the scalars. `requests` collects this rank's requests. `heartbeat` shows that this rank is alive.
        `start` has totals over earlier starts of the run. `profiler` records some steps. Raises `RunError` on every rank if the
        run cannot continue.
        """
        if tracker:
            self.log_to(tracker)
        self.ranks.requests = requests or self.ranks.requests
        self.heartbeat = heartbeat or self.heartbeat
        self.profiler = profiler or self.profiler
        self.goodput = Goodput(start) if start else None
        self.ranks.saved()  # checkpoint.every_minutes counts from now
        try:
            with self.survivor.on_guard(self.heartbeat, self.ranks.requests), self.profiler:
                return self.run()
        finally:
            self.checkpoints.finish()

    def run(self) -> str:
        """Train epoch by epoch to the end or to a stop; return the reason for the stop, or ""."""
        reason = ""
        try:
            try:
                while not self.progress.is_finished(self.config):
                    self.train_epoch()
                    self.end_epoch()
            except Stopped as stopped:
                reason = str(stopped)
                self.save(wait=True)
            self.ranks.finish()
        except Failed as failed:
            self.survivor.forbid(str(failed))
            error = failed.error_of(self.world.rank)
            raise error(f"{failed}; {self.describe_last_good(failed.wrong_since)}") from None
        return reason

    def train_epoch(self) -> None:
        """Train to the end of the epoch, or to the last step of the run if that comes first."""
        config, progress = self.config, self.progress
        end = min(self.plan.steps_per_epoch, progress.step_in_epoch + self.last_step - progress.step)
        progress.evaluating = False
        self.model.train()
        self.metrics.start_epoch()
        steps = self.metrics.timer.timed("data", self.train_loader.steps(progress.epoch, progress.step_in_epoch))
        bar = progress.bar(self.plan.steps_per_epoch, show=self.show_progress)
        with memory_advice(self.train_step, self.heartbeat.logs), bar:
            while progress.step_in_epoch < end:
                batch = next(steps)
                with self.verifier.checking(progress) as checked:
                    norm = self.train_step.gradients(batch, progress.step, self.metrics)
                with self.survivor.changing():
                    progress.advance(end, updated=self.train_step.update(norm, self.metrics))
                    self.metrics.add_step(norm, batch)
                    if checked:
                        self.log(checked)
                    if due(progress.step, config.train.log_every):
                        self.log_window()
                    if due(progress.step, config.train.fingerprint_every):
                        self.log_fingerprint()
                self.profiler.step()
                bar.update()
                self.dashboard.show_histograms(self.model, progress.step)
                self.save_due |= due(progress.step, config.checkpoint.every_steps)
                self.sync_ranks()
                if self.save_due and not progress.evaluating:  # otherwise saved after the evaluation
                    self.save()
        progress.evaluating = True
        self.metrics.stop_epoch()

    def end_epoch(self) -> None:
        """Evaluate, log a row and save, each if due. Raises `Failed` if a complete epoch did not count each image once."""
        config, progress = self.config, self.progress
        is_whole = progress.step_in_epoch == self.plan.steps_per_epoch
        is_last = progress.step == self.last_step
        number = progress.epoch + 1
        row = self.metrics.epoch_row(is_whole=is_whole)
        row["fingerprint"] = self.take_fingerprint()
        is_best, logits = False, None
        if is_last or due(number, config.eval.every):
            started = time.perf_counter()
            shown = self.dashboard.split_to_show(number, is_last=is_last or progress.may_end_early(config))
            results, logits = self.evaluator.run(progress, keep_logits_of=shown, on_batch=self.sync_ranks)
            row |= results | {"time/evaluation_s": time.perf_counter() - started}
            is_best = progress.record(results)  # all at once: a stop during the evaluation keeps the earlier results
        with self.survivor.changing():
            self.log_row(row)
            progress.end_epoch(is_whole=is_whole)
        log.info(epoch_line(row, "" if is_whole else f" (to step {progress.step})"))
        self.dashboard.show_evaluation(logits, progress.step)
        if not is_last and progress.ends_early(config):
            is_last = True
            log.info(f"ending early: no better validation accuracy since step {progress.best_step}")
        if is_last:
            self.dashboard.show_projector(self.evaluator.model, self.train_loader.normalization, progress.step)
            self.fail_if_diverged(self.ranks.compare_now())  # no later exchange compares the last fingerprints
        self.dashboard.show_ranks(self.ranks.times, number, progress.step, is_last=is_last)
        if is_last or is_best or self.save_due or due(number, config.checkpoint.every_epochs):
            self.save(wait=is_last)

    # -- what all ranks do at the same step

    def sync_ranks(self) -> None:
        """Act on the requests of all ranks, at the same call on each. Called after each step and evaluation batch.

        Raises `Stopped` or `Failed` on every rank.
        """
        self.heartbeat.beat(self.progress.step)
        decision = self.ranks.poll()
        self.fail_if_diverged(decision.diverged)
        self.save_due |= decision.save
        self.profiler.request(decision.profile)
        if decision.stop:
            raise Stopped(decision.stop)

    def fail_if_diverged(self, ranks: Sequence[int]) -> None:
        """Raise `Failed` if there are `ranks` whose weights differ from the others'."""
        if ranks:
            names = ", ".join(f"rank {rank}" for rank in ranks)
            message = f"the weights of {names} differ from those of the other ranks, found at step {self.progress.step}"
            raise Failed(message, faulty=ranks if 2 * len(ranks) < self.world.world_size else [])

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint; every rank must call it. Training continues while rank 0 writes.

        If an earlier save is still being written after a minute, this one is skipped, unless `wait`.
        """
        self.metrics.flush()
        self.save_due = False
        self.ranks.saved()
        started = time.perf_counter()
        self.finish_saves(math.inf if wait else SAVE_TIMEOUT_S)
        # write rows first: if a checkpoint is on the disk, so are all rows up to it
        self.checkpoints.save(self.state_dict(), self.progress.step, self.progress.best_step, first=self.tracker.sync)
        if self.goodput:
            self.goodput.waiting_s += time.perf_counter() - started

    def finish_saves(self, timeout_s: float = math.inf) -> None:
        """Wait until the last save is on the disk, up to `timeout_s`. The wait does not count as a hang."""
        deadline = time.perf_counter() + timeout_s
        while not self.checkpoints.finish(timeout_s=0.5) and time.perf_counter() < deadline:
            self.heartbeat.beat(self.progress.step)

    def describe_last_good(self, wrong_since: int | None) -> str:
        """Rename checkpoints that may be wrong (see `Failed`), and describe the newest good one. Every rank must call it."""

        def find() -> str | None:
            self.finish_saves()
            if wrong_since is not None:
                self.checkpoints.distrust(wrong_since)
            return str(self.checkpoints.last_good) if self.checkpoints.last_good else None

        path = self.world.on_main(find)
        return f"the last good checkpoint is {path}" if path else "no checkpoint exists yet"

    # -- rows

    def log_window(self) -> None:
        """Log a row of scalars over the steps since the last row or the start of the epoch."""
        row, work = self.metrics.window_row()
        self.ranks.set_work(self.progress.step, work)
        self.log_row(row | self.train_step.scalars() | self.ranks.scalars())
        self.metrics.start_window()

    def log_fingerprint(self) -> None:
        """Log a row that has only the fingerprint, and a line on the terminal."""
        text = self.take_fingerprint()
        self.log({"fingerprint": text})
        log.info(f"step {self.progress.step}: fingerprint {text}")

    def take_fingerprint(self) -> str:
        """Return the fingerprint of the weights in hexadecimal; ranks compare fingerprints at the next exchange."""
        value = fingerprint(self.model)
        self.ranks.set_fingerprint(value)
        return f"{value:016x}"

    def log_row(self, row: Scalars) -> None:
        """Log a row together with the run's goodput."""
        self.log({**row, **(self.goodput.scalars() if self.goodput else {})})

    def log(self, row: Scalars) -> None:
        """Log a row of the last completed step."""
        row = {**row, TIME: time.time()}
        self.survivor.rows.log(row, self.progress.step)
        self.tracker.log(row, self.progress.step)

    # -- state

    def state_dict(self) -> State:
        """Return the state for a resume: plain dicts, lists, tensors, numbers and strings."""
        parts = self.train_step.state_dict()
        return {  # in the order of older checkpoints: the digest depends on the order
            "model": parts["model"],
            "optimizer": parts["optimizer"],
            "progress": self.progress.state_dict(),
            "config": to_dict(self.config),
            "classes": list(self.dataset.classes),
            "image_shape": list(self.train_loader.image_shape),
            "normalization": self.train_loader.normalization.state_dict(),
            **parts,
        }

    def load_state_dict(self, state: State, source: str) -> None:
        """Resume from a state. Raises `UserError`, which names `source`, if its data or weights do not match this run."""
        self.progress.resume(state["progress"], source)
        self.train_loader.normalization.load_state_dict(normalization_of(state).state_dict(), source)
        self.train_step.load_state_dict(state, source, self.progress.updates)
