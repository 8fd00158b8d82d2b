"""Control of a real Slurm cluster of three nodes, which cluster.sh starts."""

import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launched import environment_of

SCRIPT = Path(__file__).parent / "cluster.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"}


def why_not() -> str | None:
    """Return the reason why this machine cannot run a cluster, or None if it can."""
    done = subprocess.run([SCRIPT, "check"], capture_output=True, text=True)
    return done.stderr.strip().removeprefix("error: ") if done.returncode else None


class Cluster:
    """A cluster of node1, node2 and node3, and a head node to submit from. `folder` has its configuration and logs.

    Commands and jobs have the programs of this Python's environment first on PATH.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def up(self) -> None:
        self._script("up")

    def down(self) -> None:
        """Shut the cluster down, with everything that runs on it."""
        self._script("down")

    def run(self, *command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command on the head node. Options: cwd, env (added to the environment), timeout in seconds, check."""
        return self._script("exec", *command, **options)

    def on(
        self, node: str, *command: str, check: bool = True, timeout: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        return self._script("on", node, *command, check=check, timeout=timeout)

    def crash(self, node: str) -> None:
        """Cut a node's power; Slurm notices after 15 to 25 s."""
        self._script("crash", node)

    def boot(self, node: str) -> None:
        self._script("boot", node)

    def nodes(self) -> dict[str, str]:
        """The state of each node, as sinfo prints it: idle, mixed, allocated, down*, ..."""
        listing = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").stdout
        return dict(line.split() for line in listing.splitlines())

    def sbatch(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submit a job or an array, and return its id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env).stdout.strip()

    def tasks(self, job: str) -> list[dict[str, str]]:
        """The fields of `scontrol show job` for each task of an array. Pending tasks share one entry."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()
        return [dict(re.findall(r"(\S+?)=(.*?)(?=\s+[\w:/]+=|\s*$)", line)) for line in lines]

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job` for one job, or for one task of an array (12_3)."""
        (fields,) = self.tasks(job)
        return fields

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def restarts(self, job: str) -> int:
        """The number of times that the job was requeued."""
        return int(self.show(job)["Restarts"])

    def log(self, job: str) -> str:
        """The output of the job so far; for an array, of one task after another."""
        paths = dict.fromkeys(Path(task["StdOut"]) for task in self.tasks(job))
        return "".join(path.read_text() for path in paths if path.exists())

    def cancel(self, job: str, *options: str) -> None:
        """Run scancel. With `--signal=...`, it only sends that signal."""
        self.run("scancel", *options, job)

    def wait_for(self, job: str, *states: str, timeout: float = 60) -> None:
        """Wait until the job, or each task of the array, is in one of the states; fail if it ends in another state."""
        seen: set[str] = set()

        def settled() -> bool:
            seen.clear()
            seen.update(task["JobState"] for task in self.tasks(job))
            return seen <= set(states) or bool(seen & ENDED - set(states))

        self.wait_until(settled, timeout, job)
        assert seen <= set(states), f"{' '.join(seen)} rather than {' or '.join(states)}\n{self.report(job)}"

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until no job is left and all nodes are idle."""
        self.wait_until(
            lambda: set(self.nodes().values()) == {"idle"} and not self.run("squeue", "--noheader").stdout, timeout
        )

    def wait_until(self, condition: Callable[[], object], timeout: float = 60, *jobs: str) -> None:
        """Wait until the condition holds. On a timeout, fail with a report of the jobs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s\n{self.report(*jobs)}"
            time.sleep(0.2)

    def report(self, *jobs: str) -> str:
        """The state and logs of the cluster and of the jobs, for the message of a failed test."""
        parts = [self._script("status", check=False).stdout]
        for job in jobs:
            parts += [f"{task['JobId']}: {task['JobState']}, {task['Reason']}" for task in self.tasks(job)]
            parts += [f"== log of {job}", self.log(job)]
        controller = (self.folder / "log" / "slurmctld.log").read_text()
        return "\n".join([*parts, "== slurmctld.log", *controller.splitlines()[-30:]])

    def _script(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [SCRIPT, *arguments],
            cwd=cwd,
            # slower steps: Slurm takes seconds to act
            env=environment_of(CLUSTER_DIR=str(self.folder), PACE_S="0.1", **(env or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{arguments}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done
