"""The report of the preflight, without a cluster. tests/slurm/test_planted_faults.py tests it with real faults."""

import json
import re
import shlex
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_mistakes import TINY

from ddp_cifar.checks.rank_context import FAIL, WARNING, Outcome
from ddp_cifar.checks.report import Row, findings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--patience", "0"], "--patience 0 is out of range"),
        (["--nodes", "0"], "--nodes 0 is out of range"),
        (["--json", "/nonexistent/a.json"], "/nonexistent is not a writable folder"),
    ],
)
def test_an_invalid_option_is_a_user_error(arguments: list[str], expected: str, shell: Callable[..., Any]) -> None:
    done = shell("python", "-m", "ddp_cifar.preflight", *arguments)
    assert done.status == 2
    assert expected in done.err
    assert len(done.err.splitlines()) == 1


def test_ranks_with_the_same_problem_share_a_line_and_failures_come_first() -> None:
    slow, full = Outcome("links", WARNING, "slow", "call"), Outcome("disk", FAIL, "full", "free space")
    found = ((0, "a", [slow, full]), (1, "a", [full]), (2, "b", [full]))
    lines = findings([Row({"rank": rank, "host": host}, outcomes) for rank, host, outcomes in found])
    silent = Row({"rank": 3, "host": "c"}, [Outcome("links", FAIL, "stopped responding")], is_silent=True)
    others = [Row({"rank": 0, "host": "a"}, [Outcome("links", FAIL, "a peer rank exited")]), silent]
    assert findings(others)[0] == "FAIL links, rank 3 (c): stopped responding", "the cause comes first"
    assert lines == [
        "FAIL disk, ranks 0, 1, 2 (a, b): full. To do: free space",
        "warning links, rank 0 (a): slow. To do: call",
    ]


@pytest.mark.slow
def test_two_nodes_with_two_ranks_and_one_rank_pass_and_leave_no_files(
    shell: Callable[..., Any], tmp_path: Path
) -> None:
    """Two torchrun agents with a rendezvous over loopback."""
    found = tmp_path / "found.json"
    arguments = shlex.join([*TINY, f"run_dir={tmp_path / 'runs' / 'run'}", "--json", str(found)])
    with socket.create_server(("127.0.0.1", 0)) as free:
        head = f"127.0.0.1:{free.getsockname()[1]}"
    common = {
        "NNODES": "2",
        "HEAD": head,
        "LOCAL_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }

    def preflight(name: str, ranks: int) -> Any:
        settings = common | {"NODE_NAME": name, "NPROC_PER_NODE": str(ranks)}
        return shell("bash", "-c", f"launch/preflight.sh {arguments}", **settings)

    with ThreadPoolExecutor() as nodes:
        two, one = nodes.map(preflight, ("two", "one"), (2, 1))
    assert (two.status, one.status) == (0, 0), two.out + two.err + one.out + one.err
    result = json.loads(found.read_text())
    assert result["ok"]
    assert Counter(rank["host"] for rank in result["ranks"]) == {"two": 2, "one": 1}
    outcomes = [outcome for rank in result["ranks"] for outcome in rank["outcomes"]]
    assert not [outcome for outcome in outcomes if outcome["verdict"] == FAIL]
    assert len(result["links"]) == 1, "between the first ranks of the nodes"
    assert re.search(r"3 ranks on 2 nodes \(\d on \w+, \d on \w+\)", two.out + one.out)
    assert "the preflight passed in " in two.out + one.out
    assert not (tmp_path / "runs").exists()
    rejected = shell("bash", "-c", f"launch/preflight.sh {arguments} optim.lrr=1")
    assert rejected.status == 2
    assert "did you mean optim.lr?" in rejected.err.splitlines()[-1]


# sitecustomize.py, which rank 1 runs before any other code
FAULT = """
import os, signal, time
if os.environ.get('RANK') == '1':
    import ddp_cifar.checks.{module}
    ddp_cifar.checks.{module}.{function} = lambda _: {fault}
"""


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "fault", "expected"),
    [
        (
            "machine.check_limits",
            "time.sleep(100)",
            "FAIL limits, rank 1 ({host}): this check is blocked on {host} and timed out",
        ),
        (
            "machine.check_limits",
            KILLED,
            "FAIL limits, rank 1 ({host}): the rank stopped responding during the check 'limits'",
        ),
        (
            "rank_context.open_store",
            f"time.sleep(3) or {KILLED}",
            "FAIL arrival, rank 0 ({host}): missing: rank 1 on {host}",
        ),
    ],
)
def test_a_blocked_check_and_a_killed_rank_are_in_the_report(
    target: str, fault: str, expected: str, shell: Callable[..., Any], tmp_path: Path
) -> None:
    """The killed rank is on the node of rank 0, so torchrun also stops rank 0, during any check."""
    module, function = target.split(".")
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(module=module, function=function, fault=fault))
    arguments = shlex.join([*TINY, f"run_dir={tmp_path / 'run'}", "--patience=5"])
    done = shell(
        *("bash", "-c", f"launch/preflight.sh {arguments}"),
        **{"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
    )
    assert done.status != 0
    assert expected.format(host=socket.gethostname()) in done.out, done.out + done.err
    assert "rank host" in done.out
