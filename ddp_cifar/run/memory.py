"""The memory of this process, and whether the kernel has killed processes for lack of memory."""

import contextlib
import platform
import resource
import socket
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def peak_host_memory() -> int:
    """Return the peak memory of this process on the host, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def oom_kills(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many processes of this control group the kernel has killed so far for lack of memory; 0 if it is not known.

    Reads `oom_kill` of memory.events (cgroup v2) or memory.oom_control (cgroup v1). Source: the Linux kernel's
    admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    for folder, is_v2 in _folders(root, own):
        text = _read(folder / ("memory.events" if is_v2 else "memory.oom_control"))
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                return int(value)
    return 0


def new_oom_kills() -> int:
    """Return how many processes of this control group the kernel has killed for lack of memory since this one started."""
    return max(0, oom_kills() - _AT_START)


def lack_of_memory() -> str:
    """Say that the kernel has killed a process of this node for lack of memory since this one started; "" if it has not."""
    if not new_oom_kills():
        return ""
    limit = memory_limit()
    limited = f", whose limit is {limit / 1e9:.1f} GB here" if limit else ""
    return (
        f"the kernel has killed a rank of {socket.gethostname()} for lack of memory{limited}: request more memory, or use fewer "
        f"ranks per node or a smaller train.micro_batch_size; then run the same command to resume"
    )


def memory_limit(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the memory limit of this control group in bytes; None if it has none, or if it is not known."""
    for folder, is_v2 in _folders(root, own):
        text = _read(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).strip()
        if text.isdigit() and int(text) < 1 << 60:  # v1 has a huge number for no limit
            return int(text)
    return None


def _folders(root: Path, own: Path) -> list[tuple[Path, bool]]:
    """The folders of this process's control group for memory, the likely one first, and whether it is of cgroup v2.

    In a container the path in /proc may be the host's; the group is then at the root.
    """
    found = []
    for line in _read(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "" or "memory" in controllers.split(","):
            base = root if controllers == "" else root / "memory"
            found += [(base / path.lstrip("/"), controllers == ""), (base, controllers == "")]
    return sorted(found, key=lambda entry: entry[1])


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text()
    return ""


_AT_START = oom_kills()
