"""What a run depends on and no config says: versions, the project's own files, the device's name."""

import contextlib
import hashlib
import platform
import subprocess
from pathlib import Path

import torch

import ddp_cifar


def versions() -> dict[str, str]:
    """Of Python, torch, CUDA and NCCL, of the project's files, and of its commit where it is a checkout."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "project": f"files {_project()}"}
    folder = str(Path(ddp_cifar.__file__).parent)
    if commit := output_of("git", "-c", "safe.directory=*", "-C", folder, "rev-parse", "HEAD"):
        found["commit"] = commit[:12]
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def name_of(device: torch.device) -> str:
    """A GPU's model, or the instructions that torch has kernels for on this CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def output_of(*command: str) -> str:
    """What a program prints; nothing where it is not there, or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def _project() -> str:
    """A hash of the package's files, which tells an edited checkout from the same commit's."""
    folder = Path(ddp_cifar.__file__).parent
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()[:8]
