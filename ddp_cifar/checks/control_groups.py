"""The cores and the memory that this process may use: those of the machine, or less if its control groups limit them."""

import contextlib
import os
from pathlib import Path


def control_groups(controller: str) -> list[Path]:
    """Return the folders of this process's control groups (version 1 or 2), from its own group to the root."""
    root = Path("/sys/fs/cgroup")
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names == "" or controller in names.split(","):
                top = root / names if names and (root / names).is_dir() else root / controller if names else root
                own = top / path.lstrip("/")
                found += [each for each in (own, *own.parents) if each.is_relative_to(top)]
    return found


def available_cores() -> float:
    """Return the number of cores that this process may use: its CPU affinity, or the quota of its control groups if less."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # a group without a quota says "max", or -1
            quota, period = (group / "cpu.max").read_text().split()
            cores = min(cores, float(quota) / float(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            cores = min(cores, float(quota) / float(period)) if float(quota) > 0 else cores
    return cores


def available_memory() -> tuple[float, float]:
    """Return the (free, total) bytes of memory of this machine, or of its strictest control group."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (1024.0 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    for group in control_groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # a group without a limit says "max"
                most = float((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left = max(0.0, most - float((group / used).read_text()) + float(stat.get(cache, 0)))
                free, total = min(free, left), min(total, most)
    return free, total
