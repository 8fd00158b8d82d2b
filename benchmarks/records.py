"""images/s with what a run records of itself on, and the same run with it off: metrics, TensorBoard, progress bar, rank's log.

    torchrun --nproc_per_node=2 benchmarks/records.py

On: a row each 20 steps, as by default, twice in a slice of 40 steps. Off: none of it.
"""

import contextlib
import tempfile
from pathlib import Path

import peers
import torch
from common import Comparison, arguments, make_trainer, report

from ddp_cifar.benchmark import random_dataset, take_turns, timed, train_on
from ddp_cifar.distributed import open_world
from ddp_cifar.tracking import NullTracker, build_tracker

TARGET = 0.99


def main() -> None:
    parser = arguments("images/s with what a run records, and without", rounds=7)
    parser.add_argument("--steps", type=int, default=40, help="steps a slice (40)")
    options = parser.parse_args()
    with open_world("cpu") as world, tempfile.TemporaryDirectory() as folder, peers.left_at_once():
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        sizes = [
            f"train.global_batch_size={options.batch * world.world_size}",
            f"train.micro_batch_size={options.batch}",
        ]
        on = make_trainer(world, data, *sizes)
        off = make_trainer(world, data, *sizes, f"train.log_every={10**9}", "train.fingerprint_every=null")
        off.show_progress, on.show_progress = False, world.is_main
        with contextlib.ExitStack() as stack:
            if world.is_main:
                tracker = build_tracker(Path(folder, "metrics.jsonl"), Path(folder, "tensorboard"), 0)
                on.tracker = stack.enter_context(contextlib.closing(tracker))
            assert isinstance(off.tracker, NullTracker)
            contenders = {
                "on": timed(lambda: train_on(on, options.steps), images),
                "off": timed(lambda: train_on(off, options.steps), images),
            }
            rates = take_turns(contenders, options.rounds)
        if world.is_main:
            title = (
                f"{world.world_size} ranks x {options.batch} images, {torch.get_num_threads()} threads a rank, "
                f"{on.precision}, {options.steps} steps a slice"
            )
            report(title, rates, [Comparison("on", "off", TARGET)], options.json)


if __name__ == "__main__":
    main()
