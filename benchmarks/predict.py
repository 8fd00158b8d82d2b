"""images/s and memory of `predict` on small JPEG files, and the speed of its search for files.

    python benchmarks/predict.py

The contenders take turns and classify two folders with an untrained CNN, as a user would. The difference in time gives images/s
without the start of the command. The difference in peak memory, on one rank, is what grows with the number of files. With
glibc, the peaks of equal runs differ by tens of MB; MALLOC_MMAP_THRESHOLD_=1000000 in the environment prevents that. The search
is compared with `os.walk` alone.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Comparison, arguments, make_trainer, report
from PIL import Image
from startup import torchrun

from ddp_cifar.data.files import find_image_files
from ddp_cifar.distributed.rendezvous import open_world_alone
from ddp_cifar.run.checkpoint_file import save_checkpoint
from ddp_cifar.training.throughput import random_dataset

GROWTH_TARGET_MB = 50
SEARCHES = 20
SEARCH, WALK = "find_image_files", "os.walk"


def main() -> None:
    parser = arguments("images/s of predict by ranks", rounds=5)
    parser.add_argument("--files", type=int, nargs=2, default=(2_000, 20_000), help="files per folder (2000 20000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2), help="numbers of ranks (1 2)")
    parser.set_defaults(batch=500)
    options = parser.parse_args()
    few, many = options.files
    with tempfile.TemporaryDirectory() as name:
        checkpoint = write_checkpoint(Path(name, "cnn.pt"))
        folders = [write_images(Path(name, f"{count}"), count) for count in (few, many)]
        peaks: list[tuple[float, float]] = []

        def images_per_s(ranks: int) -> float:
            runs = [predict(ranks, options.batch, checkpoint, folder) for folder in folders]
            (seconds_few, megabytes_few), (seconds_many, megabytes_many) = runs
            if ranks == 1:
                peaks.append((megabytes_few, megabytes_many))
            rate: float = (many - few) / (seconds_many - seconds_few)
            return rate

        def files_per_s(search: str) -> float:
            started = time.perf_counter()
            found = find_image_files(folders[1]) if search == SEARCH else list(os.walk(folders[1]))
            return many / (time.perf_counter() - started) if found else 0.0

        speed: dict[str, list[float]] = {f"{ranks} ranks": [] for ranks in options.ranks}
        for number in range(options.rounds):
            for ranks in options.ranks[:: -1 if number % 2 else 1]:
                speed[f"{ranks} ranks"].append(images_per_s(ranks))
        searches: dict[str, list[float]] = {SEARCH: [], WALK: []}
        for _ in range(SEARCHES):
            for search, rates in searches.items():
                rates.append(files_per_s(search))
    report(f"predict, {few:,} and {many:,} files, {os.cpu_count()} cores", speed, [], options.json)
    growth = statistics.median(large - small for small, large in peaks) if peaks else 0
    print(f"\npeak memory of 1 rank by round: {', '.join(f'{small:.0f} and {large:.0f}' for small, large in peaks)} MB")
    print(
        f"growth, median: {growth:.0f} MB, target {GROWTH_TARGET_MB} MB: {'reached' if growth < GROWTH_TARGET_MB else 'missed'}"
    )
    report(f"search of {many:,} files", searches, [Comparison(SEARCH, WALK, 0.5)], None, "files/s")


def write_checkpoint(path: Path) -> Path:
    """Write a checkpoint of an untrained CNN."""
    with open_world_alone() as world:
        save_checkpoint(path, make_trainer(world, random_dataset(64), "train.global_batch_size=64").state_dict())
    return path


def write_images(folder: Path, count: int) -> Path:
    """Write JPEG files of 32 to 96 pixels, up to 1,000 per subfolder."""
    random = np.random.default_rng(0)
    for i in range(count):
        (subfolder := folder / f"{i // 1000}").mkdir(parents=True, exist_ok=True)
        blocks = Image.fromarray(random.integers(256, size=(8, 8, 3), dtype=np.uint8))
        blocks.resize(random.integers(32, 97, size=2).tolist()).save(subfolder / f"{i:06}.jpg")
    return folder


def predict(ranks: int, batch: int, checkpoint: Path, folder: Path) -> tuple[float, float]:
    """Return the seconds that the command takes, and its peak memory in MB; with several ranks, the launcher's."""
    launcher = [sys.executable] if ranks == 1 else torchrun(ranks)
    options = ["--output", f"{folder}.csv", "--batch-size", f"{batch}", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": f"{max(1, (os.cpu_count() or 1) // ranks)}"}
    command = [*launcher, "-m", "ddp_cifar.predict", str(checkpoint), str(folder), *options]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = int(found[1]) if found else peak  # a process that has exited has no memory
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, peak / 1000


if __name__ == "__main__":
    main()
