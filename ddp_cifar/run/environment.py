"""The environment of a run: versions, a hash of the project's files, the device's name."""

import contextlib
import hashlib
import platform
import subprocess
from pathlib import Path

import torch

import ddp_cifar
from ddp_cifar.text_files import read_lines


def versions() -> dict[str, str]:
    """Return the versions of Python, torch, CUDA, NCCL and the project, and the commit if the project is a checkout."""
    project = f"{ddp_cifar.__version__}, files {_project()}"
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "project": project}
    if commit := _commit():
        found["commit"] = commit[:12]
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or the instruction set that torch uses on this CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def cpu_model() -> str:
    """Return the model of the CPU, and the instruction set that torch uses on it. Libraries choose their kernels by both."""
    with contextlib.suppress(OSError, ValueError):
        for line in read_lines(Path("/proc/cpuinfo")):
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} with {torch.backends.cpu.get_cpu_capability()}"
    return device_name(torch.device("cpu"))


def output_of(*command: str) -> str:
    """Return the output of a program; empty if the program does not exist or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def _commit() -> str:
    """Return the commit of the checkout; empty if the package is none, even if it is installed inside another repository."""
    git = ("git", "-c", "safe.directory=*", "-C", str(Path(ddp_cifar.__file__).parent))
    is_tracked = output_of(*git, "ls-files", "--full-name", "__init__.py") == "ddp_cifar/__init__.py"
    return output_of(*git, "rev-parse", "HEAD") if is_tracked else ""


def _project() -> str:
    """Return a hash of the package's files. It distinguishes an edited checkout from its commit."""
    folder = Path(ddp_cifar.__file__).parent
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()[:8]
