"""The preflight finds faults that are planted in the nodes of a test cluster, and reports nothing on healthy nodes."""

import json
import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from documented import command_of, copy_checkout
from slurm_cluster import Cluster

TINY = (
    "data.name=shapes",
    "data.shapes.train_images=256",
    "data.shapes.test_images=64",
    "device=cpu",
    "run_dir=runs/r",
)
SIZES = ("train.global_batch_size=96", "train.micro_batch_size=8")


class Machines:
    """A copy of the checkout, and nodes on which tests plant faults and start the preflight by hand."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.copy = copy_checkout(folder)
        self.result: dict[str, Any] = {}

    def plant(self, node: str, command: str) -> None:
        self.cluster.on(node, "bash", "-ec", f"cd {shlex.quote(str(self.copy))}; {command}")

    def preflight(
        self, *nodes: str, arguments: tuple[str, ...] = (), ranks: int = 1, options: str = "", **before: str
    ) -> str:
        """Run the preflight on the nodes, after the shell commands in `before` (by node), and return all output."""
        json_file = self.copy / "preflight.json"
        json_file.unlink(missing_ok=True)
        line = shlex.join([*TINY, *SIZES, "--json", "preflight.json", *arguments])
        settings = f"NNODES={len(nodes)} NPROC_PER_NODE={ranks} " + ("HEAD=node1:29500" if len(nodes) > 1 else "")

        def start(node: str) -> str:
            command = f"cd {shlex.quote(str(self.copy))}; {before.get(node, '')} {settings} {options} launch/preflight.sh {line}"
            done = self.cluster.on(node, "bash", "-c", command, check=False, timeout=180)
            return f"{done.stdout}{done.stderr}"

        with ThreadPoolExecutor() as machines:
            said = "".join(machines.map(start, nodes))
        self.result = json.loads(json_file.read_text()) if json_file.exists() else {}
        return said

    def verdicts(self, check: str) -> dict[str, str]:
        """The worst verdict of each host's ranks."""
        found: dict[str, str] = {}
        for rank in self.result["ranks"]:
            for outcome in rank["outcomes"]:
                if outcome["check"] == check and found.get(rank["host"]) != "FAIL":
                    found[rank["host"]] = outcome["verdict"]
        return found

    def failing(self) -> set[tuple[str, str]]:
        """(check, host) of each failed check."""
        ranks = self.result["ranks"]
        return {
            (each["check"], rank["host"]) for rank in ranks for each in rank["outcomes"] if each["verdict"] == "FAIL"
        }


@pytest.fixture
def machines(cluster: Cluster, tmp_path: Path) -> Machines:
    return Machines(cluster, tmp_path)


def test_a_healthy_cluster_passes_on_slurm(cluster: Cluster, tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path)
    command = command_of("slurm/README.md", "slurm/preflight.sh")
    command = command.replace("--nodes=2 --gpus-per-node=2", "--nodes=3")
    line = f"{command} {shlex.join((*TINY, *SIZES, '--json', 'preflight.json'))}"
    job = cluster.run("bash", "-c", line, cwd=copy).stdout.split()[-1]
    cluster.wait_for(job, "COMPLETED", "FAILED", timeout=90)
    log = cluster.log(job)
    assert "the preflight passed" in log, log
    assert cluster.state(job) == "COMPLETED"
    result = json.loads((copy / "preflight.json").read_text())
    assert result["ok"]
    assert result["seconds"] < 60, "20 s on an idle machine"
    assert {rank["host"] for rank in result["ranks"]} == {"node1", "node2", "node3"}
    verdicts = [outcome["verdict"] for rank in result["ranks"] for outcome in rank["outcomes"]]
    assert set(verdicts) <= {"ok", "-"}, "not even a warning"
    assert len(result["links"]) == 3
    assert {row["bytes"] for row in result["all_reduce"]} == {2**10, 2**16, 2**20, 2**24}
    assert re.search(r"rank host\s+arrival +host\s+device .*\n.*0 node\d +ok +ok", log)
    assert not list(copy.glob("runs")), "the preflight removes what it wrote to run_dir"
    assert not list(copy.glob(".preflight-*"))


def test_all_faults_are_found_in_one_preflight(machines: Machines) -> None:
    """Four faults on three nodes: a slow link, other project files, a folder that is not shared, a flipped byte."""
    copy = machines.copy
    data = copy / "data" / "cifar-10-batches-py"
    data.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (data / name).write_bytes(name.encode() * 1000)
    damaged = copy / "damaged"
    paths = {"copy": copy, "data": data, "damaged": damaged, "other": copy / "other"}
    quoted = {name: shlex.quote(str(path)) for name, path in paths.items()}
    machines.plant(
        "node2", "tc qdisc add dev eth0 root tbf rate 40mbit burst 32kbit latency 400ms"
    )  # few kernels have netem
    machines.plant(
        "node3",
        f"cp -r {quoted['copy']}/ddp_cifar {quoted['other']}; echo '# edited' >> {quoted['other']}/train.py; "
        f"mount --bind {quoted['other']} {quoted['copy']}/ddp_cifar",
    )
    machines.plant("node3", f"mkdir -p {quoted['copy']}/runs; mount -t tmpfs none {quoted['copy']}/runs")
    machines.plant(
        "node2",
        f"cp -r {quoted['data']} {quoted['damaged']}; printf X | dd of={quoted['damaged']}/test_batch bs=1 seek=777 "
        f"conv=notrunc status=none; mount --bind {quoted['damaged']} {quoted['data']}",
    )
    said = machines.preflight("node1", "node2", "node3", arguments=("data.name=cifar10",))
    assert machines.verdicts("versions") == {"node1": "ok", "node2": "ok", "node3": "FAIL"}, said
    assert machines.verdicts("same data") == {"node1": "ok", "node2": "FAIL", "node3": "ok"}
    assert machines.verdicts("run_dir")["node3"] == "FAIL"
    assert machines.verdicts("links") == {"node1": "warning", "node2": "FAIL", "node3": "warning"}
    assert machines.verdicts("collectives") == dict.fromkeys(("node1", "node2", "node3"), "ok"), "slow, not wrong"
    assert not machines.result["ok"]
    assert re.search(r"FAIL links, rank \d \(node2\): slow links: .*\(all of node2's\)\. To do: expected", said)
    assert re.search(r"FAIL versions, rank \d \(node3\): node3 has project", said)
    assert re.search(r"FAIL same data, rank \d \(node2\): the files of data.root=data on node2 differ from", said)
    assert "is not the same folder as on" in said or "are not visible on" in said
    assert re.search(r"error: the preflight failed: .* \(and \d more above\)", said)


def test_a_host_name_that_resolves_to_loopback_is_found(machines: Machines) -> None:
    """127.0.1.1, as Debian's installer writes it to /etc/hosts."""
    machines.plant(
        "node2", "sed s/10.77.0.12/127.0.1.1/ /etc/hosts > hosts-of-node2; mount --bind hosts-of-node2 /etc/hosts"
    )
    said = machines.preflight("node1", "node2")
    assert ("host", "node2") in machines.failing(), said
    assert ("host", "node1") not in machines.failing()
    assert "FAIL host, rank" in said
    assert (
        "the host name node2 resolves to 127.0.1.1, a loopback address that other nodes cannot use. To do: fix it in"
        in said
    )
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, one of eth0" in said
    said = machines.preflight(
        "node1", "node2", options="GLOO_SOCKET_IFNAME=eth0", node2="export LOCAL_ADDR=10.77.0.12;"
    )
    assert machines.result["ok"], said


def test_a_host_name_that_does_not_resolve_is_found(machines: Machines) -> None:
    machines.plant("node2", "hostname nowhere")
    said = machines.preflight("node1", "node2")
    assert "error: the host name of this node, nowhere, does not resolve, so other nodes cannot reach it" in said
    assert machines.result["missing"] == ["1 of 2 nodes (found: node1)"], said
    said = machines.preflight("node1", "node2", options="HEAD=head-of-all:29500 MIN_NODES=2")
    assert "error: node1 cannot resolve the rendezvous host head-of-all: fix HEAD=head-of-all:29500" in said


def test_a_link_that_drops_all_packets_is_found(machines: Machines) -> None:
    """node2 and node3 reach node1, but the packets between them are dropped."""
    for node, other in (("node2", 13), ("node3", 12)):
        machines.plant(node, f"ip neigh replace 10.77.0.{other} lladdr 02:00:00:00:00:01 dev eth0 nud permanent")
    said = machines.preflight("node1", "node2", "node3", arguments=("--patience=12",))
    failing = machines.failing()
    assert ("group", "node2") in failing or ("group", "node3") in failing, said
    assert "the ranks cannot reach each other's addresses" in said


def test_a_missing_node_and_a_rank_that_does_not_start_are_named(machines: Machines) -> None:
    said = machines.preflight(
        "node1", "node2", options="NNODES=3", arguments=("--hosts=node1,node2,node3", "--patience=8")
    )
    assert ("arrival", "node1") in machines.failing(), said
    assert machines.result["missing"] == ["node node3"]
    assert "missing: node node3" in said

    (machines.copy / "late").mkdir()
    (machines.copy / "late" / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('LOCAL_RANK') == '1': time.sleep(60)\n"
    )
    late = f"export PYTHONPATH={shlex.quote(str(machines.copy / 'late'))};"
    said = machines.preflight("node1", "node2", ranks=2, arguments=("--patience=8",), node2=late)
    assert machines.result, said
    (missing,) = machines.result["missing"]
    assert re.fullmatch(r"rank \d on node2", missing), said


def test_a_rank_that_is_killed_or_stopped_during_a_check_is_named(machines: Machines) -> None:
    """The other node reports it, within a limited time."""
    (machines.copy / "faults").mkdir()
    for signal in ("SIGKILL", "SIGSTOP"):
        (machines.copy / "faults" / "sitecustomize.py").write_text(
            "import os, signal, threading\n"
            "def look():\n"
            "    import sys\n"
            "    network = sys.modules.get('ddp_cifar.checks.network')\n"
            "    if network and hasattr(network, 'check_links'):\n"
            f"        network.time_all_reduce = lambda *_: os.kill(os.getpid(), signal.{signal})\n"
            "    else:\n"
            "        threading.Timer(0.05, look).start()\n"
            "if os.environ.get('RANK') == '1': look()\n"
        )
        fault = f"export PYTHONPATH={shlex.quote(str(machines.copy / 'faults'))} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5;"
        began = time.monotonic()
        said = machines.preflight("node1", "node2", arguments=("--patience=12",), node1=fault, node2=fault)
        assert [rank["outcomes"][0]["check"] for rank in machines.result["ranks"]] == ["arrival", "collectives"], said
        assert re.search(
            r"error: the preflight failed: collectives, rank 1 \(node\d\): the rank stopped responding during the check",
            said,
        ), said
        assert time.monotonic() - began < 75


def test_the_rendezvous_address_needs_no_host_name(machines: Machines) -> None:
    machines.plant("node2", "sed /10.77.0.11/d /etc/hosts > hosts-of-node2; mount --bind hosts-of-node2 /etc/hosts")
    own = {f"node{i}": f"export LOCAL_ADDR=10.77.0.1{i};" for i in (1, 2)}
    said = machines.preflight("node1", "node2", options="HEAD=10.77.0.11:29500", **own)
    assert machines.result["ok"], said
    assert machines.verdicts("names") == {"node1": "ok", "node2": "warning"}


def test_a_full_disk_and_too_few_cores_are_found(machines: Machines) -> None:
    runs = shlex.quote(str(machines.copy / "runs"))
    machines.plant("node1", f"mkdir -p {runs}; mount -t tmpfs -o size=50m none {runs}")
    said = machines.preflight("node1", ranks=2, node1="taskset -c 0 env OMP_NUM_THREADS=1")
    assert {check for check, _ in machines.failing()} == {"disk", "cores"}, said
    assert "1 cores for 2 ranks x 1 threads. To do: request more cores" in said
    assert re.search(
        r"FAIL disk, rank 0 \(node1\): 52\.4 MB free for run_dir, 28\d\.\d MB needed for 4 checkpoints", said
    )
    assert "error: the preflight failed: " in said.splitlines()[-1]
