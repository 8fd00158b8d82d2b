"""Processes of this machine: other ranks that the same torchrun started, and the stacks of this one."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO


def is_dead(pid: int) -> bool:
    """True if the process has exited, also if torchrun has not noticed it yet (a zombie)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # the pid belongs to a new process of another user
        return True
    state, _ = state_and_parent(pid)
    return state in ("Z", "X")


def kill_sibling(pid: int) -> None:
    """Kill a process, if the torchrun that started this one also started it."""
    if state_and_parent(pid)[1] == os.getppid():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def dump_native_stacks(file: IO[str], timeout_s: float) -> None:
    """Write the stacks of this process to the file, with the frames of C++ code, if py-spy is installed and may do that."""
    if program := shutil.which("py-spy"):
        # py-spy stops this process, which therefore cannot watch the time itself
        command = ["timeout", "--signal=KILL", str(timeout_s), program, "dump", "--native", "--pid", str(os.getpid())]
        with contextlib.suppress(OSError):
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)


def state_and_parent(pid: int) -> tuple[str, int]:
    """Return the state letter and the parent's pid from /proc (proc_pid_stat(5)); ("", 0) if it is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, ValueError, IndexError):
        return "", 0
