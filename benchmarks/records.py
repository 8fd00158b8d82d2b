"""images/s with what a run records of itself on, and the same run with it off: metrics, TensorBoard, progress bar, rank's log.

    torchrun --nproc_per_node=2 benchmarks/records.py

On: a row each 20 steps, as by default, twice in a slice of 40 steps. Off: none of it. Then: the seconds of a set of TensorBoard's
pictures of 10,000 test images, for which the run waits every `tracking.pictures_every` epochs.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import Comparison, arguments, batch_sizes, make_trainer, report, title_of, tracker_in

from ddp_cifar import dashboard
from ddp_cifar.benchmark import NEVER, random_dataset, take_turns, timed, train_on
from ddp_cifar.distributed import open_world
from ddp_cifar.tracking import build_tracker

TARGET = 0.99


def main() -> None:
    parser = arguments("images/s with what a run records, and without", rounds=7)
    parser.add_argument("--steps", type=int, default=40, help="steps a slice (40)")
    options = parser.parse_args()
    with open_world("cpu") as world, tempfile.TemporaryDirectory() as folder:
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        sizes = batch_sizes(world, options.batch)
        on = make_trainer(world, data, *sizes)
        on.show_progress = world.is_main
        off = make_trainer(world, data, *sizes, f"train.log_every={NEVER}", "train.fingerprint_every=null")
        contenders = {
            "on": timed(lambda: train_on(on, options.steps), images, world),
            "off": timed(lambda: train_on(off, options.steps), images, world),
        }
        with contextlib.closing(tracker_in(Path(folder), world)) as on.tracker:
            rates = take_turns(contenders, options.rounds)
        if world.is_main:
            title = title_of(on, options.batch, f"{options.steps} steps a slice")
            report(title, rates, [Comparison("on", "off", TARGET)], options.json)
            seconds = seconds_of_pictures(Path(folder), options.rounds)
            print(f"\npictures: {statistics.median(seconds):.2f} s ({min(seconds):.2f} - {max(seconds):.2f})")


def seconds_of_pictures(folder: Path, rounds: int) -> list[float]:
    """Of a set of them; the first, which loads what draws them, does not count."""
    split = random_dataset(10_000).train
    logits = torch.randn(len(split), 10)
    names = [f"class {i}" for i in range(10)]
    seconds = []
    with contextlib.closing(build_tracker(folder / "pictures.jsonl", folder / "pictures", 0)) as tracker:
        for step in range(rounds + 1):
            started = time.perf_counter()
            for add in (dashboard.add_confusion, dashboard.add_wrong_images, dashboard.add_curves):
                tracker.show(lambda board, add=add, step=step: add(board, "test", split, logits, names, step))
            seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    main()
