""".ci/run, with programs that only record their calls."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import CHECKOUT

Shell = Callable[..., Any]


@pytest.mark.parametrize(
    ("tests", "failed", "rerun", "lowest", "calls", "status"),
    [
        (0, 0, 0, 0, ["make", "compat.sh"], 0),
        (0, 0, 0, 1, ["make", "compat.sh"], 1),
        (2, 3, 0, 0, ["make", "python", "compat.sh"], 0),
        (2, 3, 0, 1, ["make", "python", "compat.sh"], 1),
        (2, 3, 1, 0, ["make", "python"], 1),
        (2, 11, 0, 0, ["make"], 1),
        (2, 0, 0, 0, ["make"], 1),
    ],
)
def test_ci_tries_the_lowest_versions_after_the_tests_or_their_rerun_passed(
    tests: int, failed: int, rerun: int, lowest: int, calls: list[str], status: int, shell: Shell, tmp_path: Path
) -> None:
    def program(path: str, exit_status: int = 0, first: str = "") -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f'#!/bin/sh\n{first}\necho "$0 $*" >>calls\nexit {exit_status}\n')
        (tmp_path / path).chmod(0o755)

    program("bin/apt-get")
    program("bin/make", tests, first='[ "$1" != install ] || exit 0')
    program("tests/slurm/cluster.sh")
    program(".venv/bin/python", rerun)
    program("tests/compat.sh", lowest, first='while [ ! -e "$5" ]; do sleep 0.05; done')
    last_failed = tmp_path / ".pytest_cache" / "v" / "cache" / "lastfailed"
    last_failed.parent.mkdir(parents=True)
    last_failed.write_text(json.dumps({f"test_{i}": True for i in range(failed)}, indent=2))
    (tmp_path / ".ci").mkdir()
    shutil.copy(CHECKOUT / ".ci" / "run", tmp_path / ".ci")

    done = shell("bash", "-c", f'PATH="{tmp_path}/bin:$PATH" .ci/run', cwd=tmp_path)
    assert done.status == status, done.err
    called = [line.split(" ", 1) for line in (tmp_path / "calls").read_text().splitlines()]
    names = [Path(path).name for path, _ in called]
    assert [name for name in names if name not in ("apt-get", "cluster.sh")] == calls
    if "compat.sh" in calls:
        assert called[-1][1].rpartition(" ")[0] == f"--python {tmp_path}/.venv/bin/python --lowest --when"
