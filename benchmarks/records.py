"""Cost of tracking: images/s with metrics, TensorBoard and the progress bar, and without them.

    torchrun --nproc_per_node=2 benchmarks/records.py [--tracker mlflow]

On: one row per 20 steps, as by default, twice per slice of 40 steps. Off: no rows. With `--tracker`, a third contender also sends
the rows to that tracker. The script then times a set of TensorBoard pictures of 10,000 test images, for which a run waits every
`tracking.pictures_every` epochs.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import Comparison, arguments, batch_sizes, make_trainer, report, title_of, tracker_in

from ddp_cifar.config import Config
from ddp_cifar.data import DataSet
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.tracking import build_senders, build_tracker
from ddp_cifar.tracking.dashboard import Dashboard
from ddp_cifar.training.throughput import NEVER, random_dataset, take_turns, timed, train_on

TARGET = 0.99


def main() -> None:
    parser = arguments("images/s with tracking and without", rounds=7)
    parser.add_argument("--steps", type=int, default=40, help="steps per slice (40)")
    parser.add_argument("--tracker", help="also measure with tracking.name=TRACKER, which its variables must lead to")
    options = parser.parse_args()
    with open_world("cpu") as world, contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        images = options.steps * options.batch * world.world_size
        data = random_dataset((options.rounds + 1) * images)
        sizes = batch_sizes(world, options.batch)
        on = make_trainer(world, data, *sizes)
        on.show_progress = world.is_main
        off = make_trainer(
            world, data, *sizes, f"train.log_every={NEVER}", "train.fingerprint_every=null", "train.verify_every=null"
        )
        contenders = {
            "on": timed(lambda: train_on(on, options.steps), images, world),
            "off": timed(lambda: train_on(off, options.steps), images, world),
        }
        on.tracker = stack.enter_context(contextlib.closing(tracker_in(Path(folder), world)))
        comparisons = [Comparison("on", "off", TARGET)]
        if options.tracker:
            run_dir = Path(folder) / "sent"
            sent = make_trainer(world, data, *sizes, f"tracking.name={options.tracker}", f"run_dir={run_dir}")
            sent.show_progress = world.is_main
            if world.is_main:
                run_dir.mkdir()
                files = run_dir / "metrics.jsonl", run_dir / "tensorboard"
                sent.tracker = build_tracker(*files, 0, senders=build_senders(sent.config, {}))
            stack.callback(sent.tracker.close)
            contenders[options.tracker] = timed(lambda: train_on(sent, options.steps), images, world)
            comparisons.append(Comparison(options.tracker, "on", TARGET))
        rates = take_turns(contenders, options.rounds)
        if world.is_main:
            title = title_of(on, options.batch, f"{options.steps} steps per slice")
            report(title, rates, comparisons, options.json)
            seconds = seconds_of_pictures(Path(folder), options.rounds)
            print(f"\npictures: {statistics.median(seconds):.2f} s ({min(seconds):.2f} - {max(seconds):.2f})")


def seconds_of_pictures(folder: Path, rounds: int) -> list[float]:
    """Return the seconds per set of pictures, without the first set, which imports the drawing code."""
    split = random_dataset(10_000).train
    dataset = DataSet(split, split, tuple(f"class {i}" for i in range(10)))
    logits = torch.randn(len(split), len(dataset.classes))
    seconds = []
    with contextlib.closing(build_tracker(folder / "pictures.jsonl", folder / "pictures", 0)) as tracker:
        dashboard = Dashboard(tracker, Config(), dataset)
        for step in range(rounds + 1):
            started = time.perf_counter()
            dashboard.show_evaluation(logits, step)
            seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    main()
