"""Train a model: `[torchrun ...] python -m ddp_cifar.train [CONFIG.yaml] [key=value ...]`.

With `--dry-run [--nodes N] [--nproc-per-node N]`, check and describe the run without training.
"""

import contextlib
import inspect
import shlex
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ddp_cifar.command import (
    EXIT_SAVE_FAILED,
    Arguments,
    check_counts,
    final_status,
    record_final_error,
    record_run_dir,
    run_command,
)
from ddp_cifar.config import TrainConfig, load_config, recipe_of, to_yaml
from ddp_cifar.distributed.environment import check_started_by_torchrun, rank_and_world_size
from ddp_cifar.errors import UserError, few_of
from ddp_cifar.log import log, log_to_file, show
from ddp_cifar.run.run_dir import RunDir, Start

if TYPE_CHECKING:
    from ddp_cifar.run.signs import Sign
    from ddp_cifar.tracking.base import Tracker
    from ddp_cifar.training.trainer import Trainer

DRY_RUN = "--dry-run"


def main(argv: Sequence[str]) -> int:
    """Train with the arguments `argv`, and return the exit status."""
    began = time.time()
    if DRY_RUN in argv:
        return dry_run(argv)
    config = load_config(argv)
    check_started_by_torchrun()

    # importing torch takes seconds: not needed for --help or for an error in the config
    from ddp_cifar.data import build_dataset
    from ddp_cifar.data.batch_plan import check_batch_size
    from ddp_cifar.distributed.rendezvous import open_world
    from ddp_cifar.run.checkpoint_store import Checkpoints
    from ddp_cifar.run.environment import device_name
    from ddp_cifar.run.events import recording_crashes
    from ddp_cifar.run.heartbeat import Heartbeat
    from ddp_cifar.run.resume import check_same_run, find_checkpoint
    from ddp_cifar.run.signs import read_sign
    from ddp_cifar.run.stopping import Requests
    from ddp_cifar.tracking import send_rest
    from ddp_cifar.tracking.base import NullTracker
    from ddp_cifar.training.build import build_trainer, initial_weights, set_up_kernels
    from ddp_cifar.training.profiling import Profiler
    from ddp_cifar.training.progress import Progress

    rank, world_size = rank_and_world_size()
    check_batch_size(config.train, world_size)
    run_dir = RunDir(config.run_dir)
    with (
        contextlib.closing(run_dir),
        Requests(run_dir.path if rank == 0 else None, find_deadline(config.train, began)) as requests,
        contextlib.ExitStack() as trackers,  # closed last: no rank waits until rank 0 has sent its metrics to a service
        open_world(
            config.device,
            config.backend,
            timeout=timedelta(seconds=config.comm.timeout_s),
            survives=config.checkpoint.on_failure,
        ) as world,
        contextlib.ExitStack() as stack,
    ):
        world.on_main(run_dir.claim)
        log_to_file(run_dir.rank_log(world.rank), world.rank, world.world_size)
        last_beat = read_sign(run_dir.heartbeats, rank=0)
        timeouts = config.train.hang_timeout_s, config.train.silent_timeout_s
        heartbeat = stack.enter_context(Heartbeat(run_dir.heartbeats, run_dir.logs, world, *timeouts))
        log.addHandler(heartbeat.events)
        stack.enter_context(recording_crashes(run_dir.rank_log(world.rank).with_suffix(".crash")))
        record_run_dir(run_dir.path)
        set_up_kernels(config.train, world)

        checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoint.keep)
        resumed = world.on_main(lambda: find_checkpoint(config.resume, checkpoints))
        progress = Progress()
        if resumed:
            check_same_run(resumed, config)
            progress.load_state_dict(resumed.state["progress"])
            if progress.is_finished(config):
                if world.is_main:
                    run_dir.write_status("finished")  # a crash just after the last save leaves another status
                    trackers.callback(send_rest, config)
                limit = "train.patience_epochs" if progress.ends_early(config) else "train.epochs or train.max_steps"
                log.info(f"{run_dir.path} is finished: {progress}; to continue, raise {limit}")
                return 0

        step, reached = progress.step, last_beat.step if last_beat else 0
        world.on_main(lambda: run_dir.check_crash_loop(step, reached))
        init = None if resumed else world.on_main(lambda: initial_weights(config))
        dataset = build_dataset(config.data, world)
        trainer = build_trainer(config, world, dataset, checkpoints, init)
        if resumed:
            trainer.load_state_dict(resumed.state, source=str(resumed.path))
            log.info(f"resuming from {resumed.path}: {progress}")
        places = world.gather_objects((socket.gethostname(), device_name(world.device)))
        rows = resumed.state.get("rows", []) if resumed else []
        start: Start | None = None
        tracker: Tracker = NullTracker()
        if world.is_main:
            start, tracker = start_records(run_dir, trainer, began, places, last_beat, rows, recipe_of(argv))
        requests.catch_signals()
        trackers.enter_context(contextlib.closing(tracker))
        with run_dir.recording_failure():
            profiler = Profiler(run_dir.profile, world, trainer.progress.step, config.train.profile_steps)
            reason = trainer.fit(requests=requests, heartbeat=heartbeat, start=start, profiler=profiler)
            ended = f"stopped: {reason}" if reason else "finished"

            def end() -> int:
                """Write the last rows, then the final status; return the exit status."""
                trainer.dashboard.show_history(run_dir.read_starts(), ended, trainer.progress.step)
                tracker.end(ended)
                tracker.sync()
                run_dir.write_status(ended)
                requests.stopped()
                return EXIT_SAVE_FAILED if checkpoints.failed_saves else 0

            status = world.on_main(end)
        if reason:
            log.info(f"stopped by {reason}: {trainer.progress}; run the same command to resume")
        else:
            log.info(f"finished: {trainer.progress}")
        log.info(
            f"results in {run_dir.path}: checkpoints/, metrics.jsonl, tensorboard/ "
            f"(tensorboard --logdir {shlex.quote(str(run_dir.path))})"
        )
        if status and world.is_main:
            message = (
                f"{checkpoints.failed_saves} checkpoints could not be saved (see the warnings above); "
                f"the last good one is {checkpoints.last_good or 'none'}"
            )
            log.error(message)
            return record_final_error(message, status)
    return final_status(status)


def dry_run(argv: Sequence[str]) -> int:
    """Check a run before you submit it: `python -m ddp_cifar.train --dry-run [--nodes N] [--nproc-per-node N] ...`.

    Runs on one process without a GPU. Checks that the config is valid, that data and checkpoints exist and match, that a step
    can be divided among the ranks, and that the model and the optimizer can make a step. Prints a description of the run.
    """
    parser = Arguments("ddp_cifar.train", inspect.getdoc(dry_run))
    parser.add_argument(DRY_RUN, action="store_true")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", type=int, default=1, help="ranks per node (default 1)")
    parser.add_argument("arguments", metavar="CONFIG.yaml key=value", nargs="*", help="the arguments of train")
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "nodes", "nproc_per_node")
    if (found := rank_and_world_size()[1]) > 1:
        raise UserError(f"{DRY_RUN} runs on one process, found {found}: start it with python, not with torchrun")
    config = load_config(options.arguments)

    from ddp_cifar.dry_run import describe_run  # imports torch, which takes seconds

    show(describe_run(config, options.nodes, options.nproc_per_node))
    return 0


def find_deadline(train: TrainConfig, began: float) -> tuple[float, str] | None:
    """Return the Unix time at which a command started at `began` must stop, and the config key that sets it."""
    given = [] if train.deadline is None else [(train.deadline, "train.deadline")]
    given += [] if train.max_hours is None else [(began + 3600 * train.max_hours, "train.max_hours")]
    return min(given, default=None)


def start_records(
    run_dir: RunDir,
    trainer: "Trainer",
    began: float,
    places: Sequence[tuple[str, str]],
    last_beat: "Sign | None",
    rows: Sequence[dict[str, Any]],
    recipe: str,
) -> "tuple[Start, Tracker]":
    """Record the start, write config and status, open the trackers, and add the start to TensorBoard.

    `places` has the host and device of each rank. `last_beat` is the last heartbeat of the previous start. `rows` are the
    last rows before the checkpoint; those that were lost are logged again. Raises `UserError` if run_dir cannot be written.
    """
    from ddp_cifar.run.environment import versions
    from ddp_cifar.tracking import build_senders, build_tracker
    from ddp_cifar.tracking.jsonl import last_value

    config, progress = trainer.config, trainer.progress
    hosts = few_of(list(dict.fromkeys(host for host, _ in places)))
    about = {"recipe": recipe, "ranks": str(len(places)), "hosts": hosts, "device": places[0][1], **versions()}
    try:
        run_dir.write_config(to_yaml(config))
        senders = build_senders(config, about, lambda: not progress.evaluating)
        tracker = build_tracker(run_dir.metrics, run_dir.tensorboard, progress.step, progress.epoch, senders, rows)
        last_seen = (last_beat.time, last_beat.step) if last_beat else None
        productive_s = last_value(run_dir.metrics, "run/productive_s")
        start = run_dir.note_start(began, progress.step, len(places), last_seen, productive_s, about)
    except OSError as error:
        raise UserError(f"cannot write to run_dir={run_dir.path} ({error.strerror}); choose another run_dir") from error
    run_dir.write_status("running")
    if start.restarts:
        log.info(f"start {start.restarts + 1} of this run; {start.steps_lost} steps lost so far")

    trainer.log_to(tracker)
    trainer.dashboard.show_start(progress.step, places, run_dir.read_starts(), trainer.train_loader, trainer.model)
    return start, tracker


if __name__ == "__main__":
    run_command(main)
