"""launch/ssh.sh with a real sshd on each node of the test cluster, and with keys that are generated for the test."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from documented import copy_checkout
from launched import ARGUMENTS, CHECKOUT, SHORT, wait_until
from slurm_cluster import Cluster

LONG = ("train.epochs=400",)


class Hosts:
    """node1, node2 and node3 with an sshd each, and a copy of the checkout in a shared folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.copy = cluster, folder, copy_checkout(folder)
        keys = folder / "keys"
        keys.mkdir()
        for name in ("user", "node1", "node2", "node3"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
        (keys / "authorized").write_text((keys / "user.pub").read_text())
        known = ""
        for node in ("node1", "node2", "node3"):
            known += f"{node} {(keys / f'{node}.pub').read_text()}"
            (keys / f"{node}.conf").write_text(
                f"HostKey {keys / node}\nAuthorizedKeysFile {keys / 'authorized'}\nPasswordAuthentication no\nUsePAM no\n"
                f"StrictModes no\nPidFile none\nPermitRootLogin prohibit-password\n"
            )
            cluster.on(
                node,
                "bash",
                "-c",
                f"mkdir -p /run/sshd; exec /usr/sbin/sshd -f {shlex.quote(str(keys / f'{node}.conf'))}",
            )
        (keys / "known").write_text(known)
        (keys / "config").write_text(
            f"IdentityFile {keys / 'user'}\nUserKnownHostsFile {keys / 'known'}\nStrictHostKeyChecking yes\nUser root\n"
        )
        setup = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        self.environment = {
            "SSH": f"ssh -F {keys / 'config'}",
            "SETUP": setup,
            "NPROC_PER_NODE": "2",
            "OMP_NUM_THREADS": "1",
        }

    def command(self, hosts: str, *arguments: str) -> list[str]:
        (self.copy / "hosts").write_text(hosts)
        return ["launch/ssh.sh", "hosts", *ARGUMENTS, *arguments]

    def run(self, hosts: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run launch/ssh.sh on the head node until it exits."""
        env = self.environment | environment
        return self.cluster.run(*self.command(hosts, *arguments), cwd=self.copy, env=env, timeout=120, check=False)

    def start(self, hosts: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start launch/ssh.sh on the head node, and wait until the run has saved a checkpoint."""
        script = Path(__file__).parent / "cluster.sh"
        process = subprocess.Popen(
            [script, "exec", "bash", "-c", 'echo $$ > pid; exec "$@"', "-", *self.command(hosts, *arguments)],
            cwd=self.copy,
            env={**os.environ, **self.environment, "CLUSTER_DIR": str(self.cluster.folder)},
            stdin=subprocess.DEVNULL,
            stdout=open(self.folder / "out", "w"),  # noqa: SIM115 - until the process ends
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert wait_until(lambda: any(self.copy.glob("run/checkpoints/step_*.pt")) or process.poll() is not None, 90), (
            self.said
        )
        assert process.poll() is None, self.said
        return process

    @property
    def said(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def status(self) -> str:
        return (self.copy / "run" / "status").read_text().strip()

    def signal(self, name: str) -> None:
        """Send a signal to launch/ssh.sh."""
        self.cluster.run("kill", f"-{name}", (self.copy / "pid").read_text().strip())

    def left(self) -> dict[str, str]:
        """The processes of the run that are still alive, by host."""
        find = "pgrep -fa '[d]dp_cifar|[t]orchrun|[n]ode.sh|[r]emote.sh' || true"
        return {node: said for node in ("node1", "node2") if (said := self.cluster.on(node, "bash", "-c", find).stdout)}

    def none_left(self, seconds: float) -> bool:
        return wait_until(lambda: not self.left(), seconds)


@pytest.fixture
def hosts(cluster: Cluster, tmp_path: Path) -> Hosts:
    if not Path("/usr/sbin/sshd").exists():
        pytest.skip("needs sshd: Debian's openssh-server")
    return Hosts(cluster, tmp_path)


TWO = "# the rendezvous is on the first host\nnode1\n  root@node2   # with its user\n"


def test_a_run_on_two_hosts_finishes(hosts: Hosts) -> None:
    """The user's login shell on node2 is dash."""
    shell = f"sed -E '/^root:/s|[^:]*$|/bin/dash|' /etc/passwd > {shlex.quote(str(hosts.copy))}/passwd"
    hosts.cluster.on("node2", "bash", "-ec", f"{shell}; mount --bind {shlex.quote(str(hosts.copy))}/passwd /etc/passwd")
    done = hosts.run(TWO, *SHORT, "run_dir=it's a run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 (2 nodes x 2)" in done.stdout, "the dry run"
    assert "[node1] [rank 0] " in done.stdout or "[root@node2] [rank 0] " in done.stdout
    assert (hosts.copy / "it's a run" / "status").read_text() == "finished\n"
    assert hosts.none_left(10), hosts.left()

    preflight = hosts.run(TWO, "--json", "found.json", MODULE="ddp_cifar.preflight")
    assert preflight.returncode == 0, preflight.stdout + preflight.stderr
    assert json.loads((hosts.copy / "found.json").read_text())["ok"]


def test_without_a_checkout_the_hosts_run_the_installed_package(hosts: Hosts) -> None:
    for name in ("ddp_cifar", "configs"):
        shutil.rmtree(hosts.copy / name)
    setup = hosts.environment["SETUP"]
    done = hosts.run(
        TWO, "demo", *SHORT, "run_dir=run", SETUP=f"{setup}; export PYTHONPATH={shlex.quote(str(CHECKOUT))}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert hosts.status == "finished"


def test_each_host_that_is_not_ready_is_named(hosts: Hosts) -> None:
    hosts.cluster.crash("node3")
    done = hosts.run(f"{TWO}node3\n", "run_dir=run", "train.global_batch_size=48")
    assert done.returncode == 2
    assert "error: node3 cannot be reached by ssh (" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 of 3 hosts are not ready (see above); nothing was started"

    setup = f"{hosts.environment['SETUP']}; [ $(hostname) != node2 ] || PATH=/usr/bin:/bin"
    done = hosts.run(TWO, "run_dir=run", SETUP=setup)
    assert done.returncode == 2
    assert "error: root@node2: torchrun is not on PATH: set SETUP to the command" in done.stderr

    copy = shlex.quote(str(hosts.copy))
    edit = f"cd {copy}; cp ddp_cifar/train.py other; echo '# edited' >> other; mount --bind other ddp_cifar/train.py"
    hosts.cluster.on("node2", "bash", "-c", edit)
    done = hosts.run(TWO, "run_dir=run")
    assert done.returncode == 2
    assert " differs between root@node2 (" in done.stderr
    assert "check out the same commit" in done.stderr

    done = hosts.run("node1\n", "run_dir=run", "optim.lrr=1")
    assert done.returncode == 2
    assert "error: node1: " in done.stderr
    assert "did you mean optim.lr?" in done.stderr
    assert not (hosts.copy / "run").exists()
    invalid_files = {
        "# none\n": "lists no hosts",
        "node1\nnode1\n": "lists node1 twice",
        "a slots=2\n": "the line 'a slots=2'",
    }
    for content, message in invalid_files.items():
        assert message in hosts.run(content).stderr


@pytest.mark.parametrize("name", ["INT", "KILL"])
def test_ctrl_c_and_a_lost_client_leave_no_process_behind(hosts: Hosts, name: str) -> None:
    process = hosts.start(TWO, *LONG, "run_dir=run")
    hosts.signal(name)
    status = process.wait(60)
    assert (status == 0) == (name == "INT"), hosts.said
    assert hosts.none_left(40), hosts.left()
    assert hosts.status.startswith("stopped: SIGINT" if name == "INT" else "stopped: SIGTERM"), hosts.said


def test_a_lost_connection_shuts_down_all_hosts(hosts: Hosts) -> None:
    process = hosts.start(TWO, *LONG, "run_dir=run")
    hosts.cluster.on("node2", "ip", "link", "set", "eth0", "down")
    assert process.wait(120) != 0
    assert "error: " in hosts.said.splitlines()[-1]
    assert hosts.none_left(100), hosts.left()


def test_a_killed_rank_shuts_down_all_hosts_and_is_reported_last(hosts: Hosts) -> None:
    process = hosts.start(TWO, *LONG, "run_dir=run")
    heartbeat = json.loads((hosts.copy / "run" / "heartbeats" / "rank_3").read_text())
    hosts.cluster.on(heartbeat["host"], "kill", "-9", str(heartbeat["pid"]))
    assert process.wait(90) == 1, hosts.said
    last = hosts.said.splitlines()[-1]
    assert "error: a process exited without an error message" in last or "a peer rank exited" in last
    assert hosts.none_left(30), hosts.left()


def test_a_lost_host_is_left_out_of_the_next_start(hosts: Hosts) -> None:
    """Also if it is the one with the rendezvous and rank 0. No step is lost, with ranks on the other host."""
    hosts.environment |= {"MIN_NODES": "1"}
    process = hosts.start(TWO, "train.epochs=30", "run_dir=run")
    hosts.cluster.crash("node1")
    assert process.wait(150) == 0, hosts.said
    assert "the run crashed; starting again on 1 of 2 hosts (node2)" in hosts.said
    assert hosts.status == "finished"
    starts = [json.loads(line) for line in (hosts.copy / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(start["world_size"], start["steps_lost"]) for start in starts] == [(4, 0), (2, 0)]
