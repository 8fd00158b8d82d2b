"""The precision of matrix products, and which precisions the hardware supports."""

import torch

from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError


def bf16_is_native(device: torch.device) -> bool:
    """True if the hardware multiplies bf16 matrices. Emulation would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, the first generation with bf16 tensor cores
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.11
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return a context in which matrix products are computed in `precision`: fp32, tf32, bf16 or fp16."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def missing_for(precision: str, device: torch.device) -> str:
    """Return the requirement of `precision` that the device does not meet; empty if it meets all."""
    if precision == "tf32" and not (device.type == "cuda" and bf16_is_native(device)):
        return "an NVIDIA GPU of the Ampere generation or later"
    if precision == "fp16" and device.type == "mps":
        return "device cuda or cpu"
    return ""


def pick_precision(precision: str, world: World) -> str:
    """Return the precision to use, and set torch's options for it.

    `auto` is bf16 if the hardware of every rank supports it, otherwise fp32. Raises `UserError` if the device does not support
    `precision`.
    """
    device = world.device
    if needed := missing_for(precision, device):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(f"precision={precision} needs {needed}, found {found}; use precision=auto")
    if device.type == "cuda":
        # true fp32: by default, torch rounds the inputs of convolutions to the 10 bits of tf32
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if precision != "auto":
        return precision
    return "bf16" if world.all(bf16_is_native(device)) else "fp32"
