"""What a rank uses between two of its training steps: collectives, CPU time, connections, threads, memory, bytes, files.

Only the standard library is imported before the first measured step, so that a bare script stays bare.
"""

import contextlib
import json
import os
import resource
import socket
import stat
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Meter:
    """Call `step` after each training step. After step `last`, FOLDER/rank_N.json has what this rank has used since `first`."""

    def __init__(self, folder: Path, first: int, last: int, watched: Path | None = None) -> None:
        """`watched`: the folder on shared storage whose files are counted."""
        self.folder, self.first, self.last = folder, first, last
        self.steps = self.files = 0
        if watched:
            sys.addaudithook(lambda event, args: self._count(event, args, f"{watched}/"))

    def step(self) -> None:
        self.steps += 1
        if self.steps == 1:
            self.first_step = time.time()
        if self.steps == self.first:
            self.before = self._read()
        if self.steps == self.last:
            after = self._read()
            steps = self.last - self.first
            growing = {name: after[name] - self.before[name] for name in after if name not in LEVELS}
            seconds = growing["seconds"]
            found = {name: after[name] for name in LEVELS} | {
                "collectives_per_step": growing["collectives"] / steps,
                "cpu_s_per_step": growing["cpu_s"] / steps,
                "bytes_per_step": growing["bytes_sent"] / steps,
                "files_per_s": growing["files"] / seconds,
                "steps_per_s": steps / seconds,
                "first_step": self.first_step,
            }
            path = self.folder / f"rank_{os.environ['RANK']}.json"
            path.with_suffix(".tmp").write_text(json.dumps(found))
            os.replace(path.with_suffix(".tmp"), path)

    def _count(self, event: str, args: tuple[Any, ...], watched: str) -> None:
        """Count files in `watched` that are opened, renamed, listed or removed."""
        if event in ("open", "os.rename", "os.remove", "os.listdir", "os.scandir"):
            self.files += any(isinstance(arg, str | os.PathLike) and os.fspath(arg).startswith(watched) for arg in args)

    def _read(self) -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        connections = established()
        return {
            "seconds": time.perf_counter(),
            "cpu_s": used.ru_utime + used.ru_stime,
            "connections": len(connections),
            "threads": int(status["Threads"]),
            "memory_mb": int(status["VmRSS"].split()[0]) / 1000,
            "bytes_sent": sum(connections),
            "collectives": collectives(),
            "files": self.files,
        }


LEVELS = ("connections", "threads", "memory_mb")
"""What is counted at one moment."""


def established() -> list[int]:
    """Return, for each TCP connection of this process, the bytes that it has sent."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, struct.error):
            descriptor = int(entry)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    # tcp_info of linux/tcp.h: tcpi_state (1 is established), and tcpi_bytes_acked at byte 120
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    if info[0] == 1:
                        found.append(struct.unpack_from("<Q", info, 120)[0])
    return found


def collectives() -> int:
    """Return the number of collectives so far, of all process groups, from torch's flight recorder."""
    from ddp_cifar.distributed.collectives import flight_records

    last: dict[str, int] = {}
    for entry in flight_records(stacks=False):
        group = str(entry["process_group"])
        last[group] = max(last.get(group, 0), entry["collective_seq_id"])
    return sum(last.values())


def read(folder: Path, ranks: int) -> list[Mapping[str, float]]:
    """Return what each rank has written. Raises `OSError` if one has not."""
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
