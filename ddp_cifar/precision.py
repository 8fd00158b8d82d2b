"""The precision that matrix products are computed in, and what the hardware has of it."""

import torch

from ddp_cifar.distributed import World, bf16_is_native
from ddp_cifar.errors import UserError


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """In the body, matrix products are computed in `precision`: fp32, tf32, bf16 or fp16."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def missing_for(precision: str, device: torch.device) -> str:
    """What `precision` needs that the device is not; empty where it can be used."""
    if precision == "tf32" and not (device.type == "cuda" and bf16_is_native(device)):
        return "an NVIDIA GPU of the Ampere generation or later"
    if precision == "fp16" and device.type == "mps":
        return "device cuda or cpu"
    return ""


def pick_precision(precision: str, world: World) -> str:
    """The precision to use, with torch's switches set for it: `auto` is bf16 where every rank's hardware computes in it,
    else fp32. Raises `UserError` if the device has no such precision.
    """
    device = world.device
    if needed := missing_for(precision, device):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(f"precision={precision} needs {needed}, found {found}: use auto")
    if device.type == "cuda":
        # fp32 means fp32: torch's default would round the products of convolutions to 10 bits
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if precision != "auto":
        return precision
    return "bf16" if world.all(bf16_is_native(device)) else "fp32"
