"""A fingerprint of all weights and buffers of a model, computed on its device. It changes if any bit changes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MULTIPLIER = 0x9E3779B1  # 2^32 over the golden ratio, made odd (Knuth, The Art of Computer Programming 3, 6.4)


@torch.no_grad()
def fingerprint(model: nn.Module) -> int:
    """Return a 63-bit hash of all parameters and buffers and their positions. The memory order does not matter.

    Waits for the device. The hash detects accidental changes, not attacks.
    """
    return combine([hash_of(tensor) for tensor in model.state_dict().values()])


def combine(hashes: Sequence[Tensor]) -> int:
    """Return a 63-bit hash of () int64 hashes and their order. Waits for the device."""
    total = 0
    for value in torch.stack(list(hashes)).tolist() if hashes else []:
        total = (total * 31 + value) % (2**63 - 1)
    return total


def hash_of(tensor: Tensor) -> Tensor:
    """() int64: the sum of the tensor's 32-bit words, each multiplied by an odd number that depends on its position.

    It changes if any bit changes. The memory order does not matter.
    """
    flat = tensor.contiguous().flatten()
    if flat.element_size() < 4:
        flat = flat.float()  # exact for bf16, fp16 and small integers
    words = flat.view(torch.int32)
    positions = 1 + 2 * torch.arange(len(words), dtype=torch.int32, device=words.device)
    return (words * (positions * (_MULTIPLIER - 2**32))).sum(dtype=torch.int64)
