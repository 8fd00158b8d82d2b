"""Train a network: `[torchrun ...] python -m ddp_cifar.train [CONFIG.yaml] [key=value ...]`.

With `--dry-run [--nodes N] [--nproc-per-node N]` it only looks at the run that it would be (dry_run.py).
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from ddp_cifar import dashboard
from ddp_cifar.checkpoint import (
    Checkpoints,
    NullCheckpoints,
    check_same_run,
    find_checkpoint,
    load_init,
    load_weights,
)
from ddp_cifar.command import EXIT_SAVE_FAILED, record_error, run_command
from ddp_cifar.config import Config, Tables, TrainConfig, load_config, to_yaml
from ddp_cifar.data import DATASETS, build_dataset
from ddp_cifar.data.dataset import DataSet, place_of
from ddp_cifar.data.loader import EvalLoader, TrainLoader
from ddp_cifar.data.sampler import StepSampler, check_batch_size, plan_batches, reproducible_world_sizes
from ddp_cifar.distributed import World, is_lost_peer, open_world, place_from_environment
from ddp_cifar.environment import name_of, versions
from ddp_cifar.errors import UserError
from ddp_cifar.heartbeat import Heartbeat, read_sign
from ddp_cifar.log import log, log_to_file
from ddp_cifar.models import MODELS, build_model
from ddp_cifar.optim import OPTIMIZERS, build_optimizer
from ddp_cifar.precision import pick_precision
from ddp_cifar.profile import Profile
from ddp_cifar.run_dir import RunDir, Start
from ddp_cifar.seeding import derive_seed
from ddp_cifar.stopping import Requests
from ddp_cifar.tracking import NullTracker, Tracker, build_own_tracker, build_tracker, last_value
from ddp_cifar.trainer import Progress, Trainer

TABLES: Tables = {"data.name": DATASETS, "model.name": MODELS, "optim.name": OPTIMIZERS, "tracking.name": {}}

COMPILED_ON = {"cuda"}  # on a CPU its kernels are slower than those of oneDNN, and it needs a compiler for C++
FEW_STEPS = 10  # an epoch, below which the default recipe hardly learns


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says, and return the exit status."""
    began = time.time()
    if "--dry-run" in argv:
        from ddp_cifar.dry_run import dry_run  # here, as it takes its tables from this module

        return dry_run(argv)
    config = load_config(argv, TABLES)
    rank, world_size = place_from_environment()
    check_batch_size(config.train, world_size)
    run_dir = RunDir(config.run_dir)
    with (
        Requests(run_dir.path if rank == 0 else None, find_deadline(config.train, began)) as requests,
        open_world(config.device, config.backend, timeout=timedelta(seconds=config.comm.timeout_s)) as world,
    ):
        world.on_main(run_dir.claim)
        log_to_file(run_dir.rank_log(world.rank), world.rank, world.world_size)
        set_up_kernels(config.train, world)

        checkpoints = (Checkpoints if world.is_main else NullCheckpoints)(run_dir.checkpoints, config.checkpoint.keep)
        resumed = world.on_main(lambda: find_checkpoint(config.resume, checkpoints))
        progress = Progress()
        if resumed:
            check_same_run(resumed, config)
            progress.load_state_dict(resumed.state["progress"])
            if progress.is_finished(config.train):
                if world.is_main:
                    run_dir.write_status("finished")  # a crash just after the last save leaves another word
                log.info(
                    f"{run_dir.path} is finished: {progress}. A larger train.epochs or train.max_steps would go on"
                )
                return 0

        init = None
        if not resumed and config.model.init != "random":
            init = world.on_main(lambda: load_init(config.model.init))
        dataset = build_dataset(config.data, world)
        trainer = build_trainer(config, world, dataset, checkpoints, init)
        if resumed:
            trainer.load_state_dict(resumed.state, source=str(resumed.path))
            log.info(f"going on from {resumed.path}: {progress}")
        places = world.gather_objects((socket.gethostname(), name_of(world.device)))
        start, tracker = start_records(run_dir, trainer, began, places) if world.is_main else (None, NullTracker())
        heartbeat = Heartbeat(run_dir.heartbeats, run_dir.logs, world, config.train.hang_timeout_s)
        requests.catch_signals()
        with heartbeat, contextlib.closing(tracker), run_dir.recording_failure(is_lost_peer):
            steps = config.train.profile_steps
            profile = Profile(run_dir.profile, steps, world) if steps else None
            reason = trainer.fit(tracker, requests, heartbeat, start, profile)
            ended = f"stopped: {reason}" if reason else "finished"
            tracker.show(
                lambda board: dashboard.add_history(board, run_dir.read_starts(), ended, trainer.progress.step)
            )

        def end() -> int:
            """Say how the run ended, once all of it is on the disk; returns the exit status."""
            run_dir.write_status(ended)
            requests.stopped()
            return EXIT_SAVE_FAILED if checkpoints.failed_saves else 0

        status = world.on_main(end)
        if reason:
            log.info(f"stopped by {reason}: {trainer.progress}. The same command goes on from there")
        else:
            log.info(f"finished: {trainer.progress}")
        log.info(f"in {run_dir.path}: checkpoints/, metrics.jsonl, tensorboard/ (tensorboard --logdir {run_dir.path})")
        if status and world.is_main:
            message = (
                f"{checkpoints.failed_saves} checkpoints could not be saved (the warnings above say why); "
                f"the last good one is {checkpoints.last_good or 'none'}"
            )
            log.error(message)
            record_error(message, status)
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            status = 0  # torchrun would start the run again, which has ended
    return status


def find_deadline(train: TrainConfig, began: float) -> tuple[float, str] | None:
    """The unix time at which a command that began at `began` is asked to stop, and by which key."""
    given = [] if train.deadline is None else [(train.deadline, "train.deadline")]
    given += [] if train.max_hours is None else [(began + 3600 * train.max_hours, "train.max_hours")]
    return min(given, default=None)


def start_records(
    run_dir: RunDir, trainer: Trainer, began: float, places: Sequence[tuple[str, str]]
) -> tuple[Start, Tracker]:
    """Note the start, write config and status, open the trackers, and begin TensorBoard's page; `places` are each rank's
    host and device. Raises `UserError` if run_dir cannot be written."""
    config, progress = trainer.config, trainer.progress
    sign = read_sign(run_dir.heartbeats, rank=0)
    try:
        run_dir.write_config(to_yaml(config))
        tracker = build_tracker(
            run_dir.metrics, run_dir.tensorboard, progress.step, progress.epoch, build_own_tracker(config)
        )
        last_seen = (sign.time, sign.step) if sign else None
        productive_s = last_value(run_dir.metrics, "run/productive_s")
        start = run_dir.note_start(began, progress.step, len(places), last_seen, productive_s)
    except OSError as error:
        raise UserError(f"cannot write to run_dir={run_dir.path} ({error.strerror}): choose another run_dir") from error
    run_dir.write_status("running")
    if start.restarts:
        log.info(f"start {start.restarts + 1} of this run; {start.steps_lost} steps were lost so far")

    step = progress.step
    tracker.show(dashboard.add_layout)
    tracker.show(lambda board: dashboard.add_config(board, config, step))
    tracker.show(lambda board: dashboard.add_environment(board, versions(), places, step))
    tracker.show(lambda board: dashboard.add_history(board, run_dir.read_starts(), "running", step))
    tracker.show(lambda board: dashboard.add_hparams(board, config, "test" if trainer.test else "val"))
    if step == 0 and config.tracking.pictures_every:
        tracker.show(lambda board: dashboard.add_training_images(board, trainer.train, trainer.classes))
    if step == 0 and config.tracking.graph:
        tracker.show(lambda board: dashboard.add_graph(board, trainer.model, trainer.train.image_shape))
    return start, tracker


def set_up_kernels(train: TrainConfig, world: World) -> None:
    """Set CPU threads, and whether torch takes only kernels that repeat their bits, and raises where an operation has none."""
    on_cpu = world.device.type == "cpu"
    threads = train.threads or (1 if train.reproducible and on_cpu else None)
    if threads is not None:
        torch.set_num_threads(threads)
    deterministic = train.deterministic or train.reproducible
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for, before its first use
        torch.backends.cudnn.benchmark = False
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # to set it loads torch's compiler, for a second
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a search for bugs, and slow
    if train.reproducible:
        count = check_batch_size(train, world.world_size)
        sizes = ", ".join(map(str, reproducible_world_sizes(count)))
        fixed = f"{_threads()} a rank" if on_cpu else "no choice of cuDNN kernels by trial"
        log.info(
            f"reproducible: the same bits on {sizes} ranks; sums over {count} micro-batches in a fixed tree, deterministic "
            f"kernels, {fixed}"
        )


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} CPU thread{'s' * (number > 1)}"


def build_trainer(
    config: Config,
    world: World,
    dataset: DataSet,
    checkpoints: Checkpoints,
    init: Mapping[str, Tensor] | None = None,
) -> Trainer:
    """Put the parts together for this rank, and say once what was derived from the config and the world.

    The model starts from the weights `init`, where they are given. Raises `UserError` if a part cannot be built.
    """
    if config.train.compile != "off" and world.device.type not in COMPILED_ON:
        raise UserError(f"train.compile={config.train.compile} needs a GPU, found device {world.device.type}: use off")
    plan = plan_batches(config.train, world.world_size, len(dataset.train))
    place, channels_last = world.device, config.train.channels_last
    sampler = StepSampler(plan, world.rank, config.seed)

    torch.manual_seed(derive_seed("init", config.seed))
    model = build_model(config.model, len(dataset.classes), dataset.train.image_size).to(place)
    if init is not None:
        new = load_weights(model, init, config.model.init, new_head=True)
        log.info(f"weights from {config.model.init}" + (f", but for {', '.join(new)}: other classes" if new else ""))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    precision = pick_precision(config.precision, world)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = f", {_threads()} a rank" if place.type == "cpu" else ""
    data = dataset.describe()
    dataset = dataset.to(place_of((dataset.train, dataset.val, dataset.test), place, config.data.residency))
    log.info(f"{config.data.name}: {data}")
    log.info(
        f"{config.model.name}: {parameters:,} parameters, {precision}, on {place.type} over {world.backend}{threads}"
    )
    log.info(str(plan))
    if plan.steps_per_epoch < FEW_STEPS:
        log.info("few steps an epoch for so few images: a smaller train.global_batch_size makes more of them")
    if config.train.micro_batch_size is None:
        log.info(
            "train.micro_batch_size is null: BatchNorm and dropout, and so the results, depend on the number of ranks"
        )

    return Trainer(
        config,
        world,
        model=model,
        optimizer=build_optimizer(model, config.optim),
        train=TrainLoader(dataset.train, sampler, config.seed, channels_last, place),
        test=EvalLoader(dataset.test, channels_last, place) if dataset.test else None,
        val=EvalLoader(dataset.val, channels_last, place) if dataset.val else None,
        checkpoints=checkpoints,
        precision=precision,
        data=data,
        classes=dataset.classes,
        show_progress=world.is_main and sys.stderr.isatty(),
    )


if __name__ == "__main__":
    run_command(main)
