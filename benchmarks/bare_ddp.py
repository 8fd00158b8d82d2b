"""A bare script that `startup.py` compares with: import torch, open a process group, run one step.

torchrun --nproc_per_node=2 benchmarks/bare_ddp.py IMAGES
"""

import os
import sys

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
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print("first step done", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
