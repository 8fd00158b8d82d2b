"""Train on healthy devices with a check in every step, until so many micro-batches have been compared. No rank may be accused.

    python tests/healthy.py --checks 10000

Runs of all recipes take turns: with 1 to 4 ranks, which have equal or different numbers of micro-batches, in bf16, fp32 and fp16.
Each run is resumed once. On 3 ranks in bf16, the network is the recipe's; in the other runs, it is a small one.
"""

import argparse
import itertools
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers import config_of, make_trainer, random_dataset
from launched import CHECKOUT
from ranks import RankPool

from ddp_cifar.distributed.world import World
from ddp_cifar.run.checkpoint_store import Checkpoints, NullCheckpoints
from ddp_cifar.tracking.base import NullTracker, Scalars

RECIPES = sorted(path.stem for path in (CHECKOUT / "configs").glob("*.yaml"))
SIZES = (
    "train.micro_batch_size=4",
    "train.global_batch_size=20",
    "train.max_steps={steps}",
    "train.verify_every=1",
    "train.compile=off",
)
"""Five micro-batches per step: with 2, 3 and 4 ranks, some have one more than others."""

PRECISIONS = ("bf16", "fp32", "fp16")
STEPS = 24


class Count(NullTracker):
    def __init__(self) -> None:
        self.checks = 0

    def log(self, scalars: Scalars, step: int) -> None:
        self.checks += int(scalars.get("run/verified_micro_batches", 0))


def train(world: World, folder: str, arguments: tuple[str, ...], resume: bool) -> int:
    """Train; return the number of micro-batches that were compared."""
    own, count = Checkpoints(Path(folder), keep=1), Count()
    trainer = make_trainer(
        world, config_of(*arguments), random_dataset(120), checkpoints=own if world.is_main else NullCheckpoints(own)
    )
    if resume and (loaded := own.load_latest()):
        trainer.load_state_dict(loaded.state, str(loaded.path))
    trainer.fit(count)
    assert trainer.verifier.every == 1, "the checks were turned off"
    return count.checks


def main() -> None:
    parser = argparse.ArgumentParser(description="compare micro-batches of healthy runs; no rank may be accused")
    parser.add_argument("--checks", type=int, default=10_000, help="micro-batches to compare (default 10000)")
    options = parser.parse_args()
    done: Counter[str] = Counter()
    pool, began = RankPool(), time.monotonic()
    for recipe, precision, size in itertools.cycle(itertools.product(RECIPES, PRECISIONS, (3, 2, 4, 1))):
        with tempfile.TemporaryDirectory() as folder:
            own = () if (precision, size) == ("bf16", 3) else ("model.name=tiny", "model.args={}")
            for steps in (STEPS // 2, STEPS):
                sizes = [text.format(steps=steps) for text in SIZES]
                config = str(CHECKOUT / "configs" / f"{recipe}.yaml")
                arguments = (config, *sizes, f"precision={precision}", "data.name=shapes", *own)
                done[f"{recipe}, {precision}"] += pool.run(train, size, folder, arguments, steps == STEPS)[0]
        print(f"{time.monotonic() - began:6.0f} s: {done.total():,} micro-batches compared, all equal", flush=True)
        if done.total() >= options.checks:
            break
    pool.stop()
    for name, number in sorted(done.items()):
        print(f"  {number:6,d}  {name}")


if __name__ == "__main__":
    main()
