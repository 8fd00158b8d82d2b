"""A bare script that `startup.py` and `ranks.py` compare with: import torch, open a process group, train on one batch.

torchrun --nproc_per_node=2 benchmarks/bare_ddp.py IMAGES [FOLDER FIRST LAST]

Runs one step, or LAST steps; what a rank uses from FIRST to LAST is written to FOLDER (rank_meter.py).
"""

import os
import sys
from pathlib import Path

import rank_meter
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    # the network of ddp_cifar.models.cnn, without importing the package
    widths = [(3, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        if i % 2 == 0:
            layers.insert(-1, nn.BatchNorm2d(after))
        else:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = torch.randn(int(sys.argv[1]), 3, 32, 32), torch.randint(10, (int(sys.argv[1]),))
    meter = rank_meter.Meter(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 2 else None
    for step in range(meter.last if meter else 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        if step == 0 and dist.get_rank() == 0:
            print("first step done", flush=True)
        if meter:
            meter.step()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
