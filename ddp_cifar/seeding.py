"""Every random number of a run is a function of what it is for, so that nothing random is ever stored.

Order comes from (seed, epoch), a crop from (seed, epoch, sample id), dropout from (seed, step, micro-batch).
"""

import hashlib

import torch


def derive_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed("dropout", seed, step, micro_batch)`.

    A hash, so that neighbouring numbers, or two purposes, give unrelated streams.
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded with `derive_seed`: the same numbers whatever the device of the run."""
    return torch.Generator().manual_seed(derive_seed(purpose, *numbers))


def seed_dropout(device: torch.device, *numbers: int) -> None:
    """Seed what dropout on `device` draws from, by `derive_seed`.

    `torch.manual_seed` would seed every kind of device there is, at some tenths of a millisecond a call.
    """
    seed = derive_seed("dropout", *numbers)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
