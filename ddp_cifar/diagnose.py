"""Say what happened to a run, on which rank and host, what was lost, and what to do: `python -m ddp_cifar.diagnose RUN_DIR`.

It reads the files in RUN_DIR of a run that is running, was stopped, crashed, hung or never started. A copy of RUN_DIR will do.
"""

import getpass
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ddp_cifar.command import Arguments, counted, megabytes, run_command
from ddp_cifar.log import show
from ddp_cifar.run.diagnosis import Diagnosis, diagnose

NAMES = 3
"""The most ranks and hosts in a line."""

DETAILS = 6
"""The most lines of details."""


def main(argv: Sequence[str]) -> int:
    """Print the diagnosis; return 0."""
    parser = Arguments("ddp_cifar.diagnose", __doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of the run, or a copy of it")
    parser.add_argument("--json", action="store_true", help="print JSON, for other programs")
    parser.add_argument(
        "--redact", action="store_true", help="hide hosts, addresses, paths and users, for a bug report"
    )
    options = parser.parse_args(argv)
    found = diagnose(options.run_dir)
    text = json.dumps(asdict(found), indent=2) if options.json else describe(found)
    show(redact(text, found) if options.redact else text)
    return 0


def describe(found: Diagnosis) -> str:
    """Return the diagnosis in at most 20 lines."""
    step = f" at step {found.step:,}" if found.step else ""
    when = time.strftime(", %Y-%m-%d %H:%M:%S", time.localtime(found.time)) if found.time else ""
    facts = [("run", f"{found.run_dir}: {found.state}{step}{when}"), ("cause", found.cause)]
    if found.ranks:
        facts.append(("ranks", _some([str(process) for process in found.ranks])))
    facts += [("also", detail) for detail in found.details[:DETAILS]]
    if found.state in ("crashed", "failed", "stopped"):
        facts.append(("lost", _lost(found)))
    facts.append(("do", found.advice))
    if found.world_size:
        memory = f"; peak memory of a rank {megabytes(found.peak_memory, 0)}" if found.peak_memory else ""
        ranks, starts = counted(found.world_size, "rank"), counted(found.starts, "start")
        checks = f"; {counted(found.checks, 'check')} of the devices passed" if found.checks else ""
        facts.append(("size", f"{ranks} on {_some(found.hosts)}; {starts}{memory}{checks}"))
    return "\n".join(f"{name:<8}{value}" for name, value in facts)


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:NAMES], *(["..."] if len(names) > NAMES else [])])


def _lost(found: Diagnosis) -> str:
    if not found.checkpoint:
        return "all steps, as there is no checkpoint" if found.step else "nothing, as no step was completed"
    lost = counted(found.steps_lost, "step") if found.steps_lost else "no step"
    return f"{lost}; the newest checkpoint is {found.checkpoint}"


def redact(text: str, found: Diagnosis) -> str:
    """Replace the names of hosts and users, paths and IP addresses in a text."""
    text = text.replace(found.run_dir.rstrip("/") or "/", "RUN_DIR")
    for number, host in enumerate(found.hosts, 1):
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", f"host{number}", text)
    text = re.sub(r"(?<![\w.])~?(?:/[\w.@+=-]+){2,}/?", "PATH", text)
    text = re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "ADDRESS", text)
    for user in filter(None, {Path.home().name, _user(found.run_dir)}):
        text = re.sub(rf"\b{re.escape(user)}\b", "USER", text)
    return text


def _user(run_dir: str) -> str:
    """The owner of the folder, or else the user of this process; "" if they have no name."""
    try:
        return Path(run_dir).owner() if Path(run_dir).exists() else getpass.getuser()
    except (KeyError, OSError):
        return ""


if __name__ == "__main__":
    run_command(main)
