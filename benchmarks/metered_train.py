"""`ddp_cifar.train` with a meter: torchrun ... benchmarks/metered_train.py FOLDER FIRST LAST [arguments of train].

`ranks.py` starts it. Each rank writes what it has used from step FIRST to step LAST to FOLDER (rank_meter.py).
"""

import sys
from pathlib import Path

from rank_meter import Meter
from torch import Tensor

from ddp_cifar.command import run_command
from ddp_cifar.train import main
from ddp_cifar.training.metrics import TrainMetrics
from ddp_cifar.training.step import TrainStep


def measure(meter: Meter) -> None:
    """Call the meter after each update."""
    update = TrainStep.update

    def metered(self: TrainStep, norm: Tensor, metrics: TrainMetrics) -> bool:
        updated = update(self, norm, metrics)
        meter.step()
        return updated

    TrainStep.update = metered  # type: ignore[method-assign]


if __name__ == "__main__":
    folder, first, last, *arguments = sys.argv[1:]
    run_dir = next(text.partition("=")[2] for text in arguments if text.startswith("run_dir="))
    measure(Meter(Path(folder), int(first), int(last), watched=Path(run_dir)))
    sys.argv[1:] = arguments
    run_command(main)
