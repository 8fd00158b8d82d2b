"""Every random number of a run is derived from its purpose, so that no random state has to be stored.

The order of images comes from (seed, epoch), a crop from (seed, epoch, sample id), dropout from (seed, step, micro-batch).
"""

import hashlib
import random
from contextlib import AbstractContextManager

import numpy as np
import torch


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed for one purpose, such as `derive_seed("dropout", seed, step, micro_batch)`.

    It is a hash, so that consecutive numbers and different purposes give unrelated streams.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed`. Its numbers do not depend on the device of the run."""
    return torch.Generator().manual_seed(derive_seed(purpose, *numbers))


def unchanged_generators(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which the CPU's generator, and the one of `device`, may be used; afterwards they are as before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def seed_all(device: torch.device, purpose: str, *numbers: int) -> None:
    """Seed the generators of Python, NumPy and torch, on the CPU and on `device`, by `derive_seed`."""
    seed = derive_seed(purpose, *numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        _seed_device(device, seed)


def seed_dropout(device: torch.device, *numbers: int) -> None:
    """Seed the generator that dropout on `device` uses, by `derive_seed`."""
    _seed_device(device, derive_seed("dropout", *numbers))


def _seed_device(device: torch.device, seed: int) -> None:
    """Seed the generator of `device`.

    `torch.manual_seed` would seed every type of device, which takes some tenths of a millisecond per call.
    """
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
