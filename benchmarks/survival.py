"""Cost of fault tolerance: images/s with it and without.

On: coordinated stopping, the sample ledger, heartbeats, the comparison of replicas, and one checkpoint per slice.
Off: none of them.

    torchrun --nproc_per_node=2 benchmarks/survival.py
"""

import contextlib
import tempfile
from pathlib import Path

from common import Comparison, arguments, batch_sizes, make_trainer, report, title_of

from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.run.checkpoint_store import Checkpoints, NullCheckpoints
from ddp_cifar.run.heartbeat import Heartbeat
from ddp_cifar.run.stopping import Requests
from ddp_cifar.training.throughput import NEVER, random_dataset, take_turns, timed, train_on
from ddp_cifar.training.trainer import Trainer

TARGET = 0.98


def main() -> None:
    parser = arguments("images/s with fault tolerance and without", rounds=11)
    parser.add_argument("--steps", type=int, default=60, help="steps per slice, with one checkpoint each (60)")
    options = parser.parse_args()

    with open_world("cpu") as world, contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        common = [*batch_sizes(world, options.batch), "train.straggler_factor=null", "checkpoint.every_minutes=null"]
        off = make_trainer(
            world,
            data,
            *common,
            f"train.agree_every={NEVER}",
            "train.fingerprint_every=null",
            "train.verify_every=null",
        )
        off.metrics.counter.ledger = None
        off.metrics.counter.start_reducing = lambda world: lambda: None  # type: ignore[method-assign]
        on = make_trainer(world, data, *common)
        checkpoints = Checkpoints(folder, keep=1)
        on.checkpoints = checkpoints if world.is_main else NullCheckpoints(checkpoints)
        requests = on.ranks.requests = stack.enter_context(Requests(folder if world.is_main else None))
        requests.catch_signals()
        heartbeat = Heartbeat(folder, folder, world, on.config.train.hang_timeout_s, on.config.train.silent_timeout_s)
        on.heartbeat = stack.enter_context(heartbeat)
        stack.enter_context(on.survivor.on_guard(heartbeat, requests))
        stack.callback(on.checkpoints.finish)

        def slice_of(trainer: Trainer) -> None:
            trainer.save_due = trainer is on
            train_on(trainer, options.steps)

        contenders = {
            "on": timed(lambda: slice_of(on), images, world),
            "off": timed(lambda: slice_of(off), images, world),
        }
        rates = take_turns(contenders, options.rounds)
        if world.is_main:
            title = title_of(on, options.batch, f"{options.steps} steps and one checkpoint per slice")
            report(title, rates, [Comparison("on", "off", TARGET)], options.json)


if __name__ == "__main__":
    main()
