"""Pods on this machine, and the part of Kubernetes that starts and replaces them as a manifest says.

Each pod is a set of Linux namespaces with its own address, host name, /etc/hosts and process ids, on one bridge. The container's
command is its process 1. Requires root and iproute2.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from launched import CHECKOUT, environment_of

MANIFEST = CHECKOUT / "launch" / "kubernetes" / "job.yaml"
NETWORK = ("unshare", "--net")
POD = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
SET_UP = """
hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$3/24" dev eth0 && ip link set eth0 up && shift 3 && exec "$@"
"""
BRIDGE = "ip link set lo up && ip link add br0 type bridge && ip link set br0 up && echo up && exec sleep infinity"
HOSTS_SIZE = 4000


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    """The Service and the Job."""
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    return service, job


def why_not() -> str | None:
    """Return the reason why this machine cannot run pods, or None if it can."""
    link = "ip link add br0 type bridge && ip link add v1 type veth peer name eth0"
    done = subprocess.run([*POD, "sh", "-c", link], capture_output=True)
    return "pods need root, iproute2, namespaces, bridges and veth links" if done.returncode else None


class Pod:
    """A running pod. `address` is its own; the pod that replaces it has another one."""

    def __init__(self, network: int, number: int, name: str, folder: Path, command: list[str], **options: Any) -> None:
        self.address = f"10.88.0.{number}"
        self.name, self.number = name, number
        self.killed = False
        self.hosts = folder / f"hosts-{number}"
        self.hosts.write_text("\n" * HOSTS_SIZE)
        self.output = folder / f"{name}.{number}.txt"
        self.enter = ("nsenter", f"--target={network}", "--net")
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [*self.enter, *POD, "bash", "-ec", SET_UP, "-", name, self.hosts, self.address, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **options,
            )
        self.first = _child_of(self.process.pid)
        link = (
            f"ip link add v{number} type veth peer name eth0 netns {self.first} && ip link set v{number} master br0 up"
        )
        subprocess.run([*self.enter, "sh", "-c", link], check=True)

    def cut_off(self) -> None:
        """Disconnect the pod from the network. Unlike a kill, this does not close its connections."""
        subprocess.run([*self.enter, "ip", "link", "set", f"v{self.number}", "down"], check=True)

    def send(self, signum: int) -> None:
        """Send a signal to process 1. SIGKILL kills all processes of the pod."""
        if self.process.poll() is None:
            self.killed = signum == signal.SIGKILL  # in which case `unshare` exits with its own status
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.first, signum)

    def resolve(self, lines: list[str]) -> None:
        """Change /etc/hosts. One write of constant size, because the pod may read at any time."""
        text = "".join(f"{line}\n" for line in lines)
        with open(self.hosts, "r+b", buffering=0) as file:
            file.write(text.encode().ljust(HOSTS_SIZE, b"\n"))

    def status(self) -> int | None:
        """The exit status of process 1, or None while it runs."""
        status = self.process.poll()
        return status if status is None or not self.killed else 128 + signal.SIGKILL


class Job:
    """Runs the Job of the manifest, with more arguments, and with `folder` as its volume.

    `outcomes` has (index, exit status, action) for each pod that ended. The action is `Succeeded` or that of podFailurePolicy.
    """

    def __init__(self, folder: Path, *arguments: str, nodes: int, **environment: str) -> None:
        self.service, self.job = manifest()
        self.spec, self.arguments, self.nodes, self.environment = self.job["spec"], arguments, nodes, environment
        self.volume = folder / "volume"
        self.folder = folder
        self.volume.mkdir()
        self.network = subprocess.Popen([*NETWORK, "sh", "-c", BRIDGE], stdout=subprocess.PIPE)
        assert self.network.stdout
        assert self.network.stdout.readline() == b"up\n"
        self.number = 0
        self.pods: dict[int, Pod] = {}
        self.outcomes: list[tuple[int, int, str]] = []
        self.disrupted: set[int] = set()
        """Indexes of pods with the condition DisruptionTarget."""
        self.result = ""
        """Complete or Failed."""

    def start(self, *indexes: int) -> None:
        for index in indexes or range(self.nodes):
            self.number += 1
            # addresses of replaced pods are lower and higher than those of others, as torchrun numbers nodes by their order
            number = 100 + self.number * (-1) ** self.number
            command, environment, where = self._container(index, f"10.88.0.{number}")
            name = f"{self.job['metadata']['name']}-{index}"
            self.pods[index] = Pod(
                self.network.pid, number, name, self.folder, command, env=environment_of(**environment), cwd=where
            )
        self._update_dns()

    def _container(self, index: int, address: str) -> tuple[list[str], dict[str, str], Path]:
        """The command, the environment and the working folder of the container."""
        pod = self.spec["template"]["spec"]
        (container,) = pod["containers"]
        (path,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared")
        arguments = [argument.replace(f"={path}/", f"={self.volume}/") for argument in container["args"]]
        environment = {"JOB_COMPLETION_INDEX": str(index), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
        for each in container["env"]:
            environment[each["name"]] = each.get("value", "")
            if "valueFrom" in each:
                assert each["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
                environment[each["name"]] = address
        environment |= {"NNODES": str(self.nodes), **self.environment}
        return [*container["command"], *arguments, *self.arguments], environment, CHECKOUT

    def _update_dns(self) -> None:
        service = self.spec["template"]["spec"]["subdomain"]
        up = [pod for pod in self.pods.values() if pod.status() is None]
        dns = [f"{pod.address} {pod.name}.{service} {service}" for pod in up]
        # torch looks up the name of each peer, by the IPv6 form of its address; without this it would wait for a name server
        reverse = [f"::ffff:{pod.address} address-of-{pod.name}" for pod in up]
        for pod in self.pods.values():
            own = f"{pod.address} {pod.name}.{service}.default.svc.cluster.local {pod.name}"
            pod.resolve(["127.0.0.1 localhost", own, *dns, *reverse])

    def action(self, index: int, status: int) -> str:
        """The action of podFailurePolicy for a pod that ended with this status."""
        if status == 0:
            return "Succeeded"
        for rule in self.spec["podFailurePolicy"]["rules"]:
            conditions = {each["type"] for each in rule.get("onPodConditions", ())}
            codes = rule.get("onExitCodes")
            if (index in self.disrupted and "DisruptionTarget" in conditions) or (codes and status in codes["values"]):
                return str(rule["action"])
        return "Count"

    def control(self) -> None:
        """Note the pods that have ended, and replace them."""
        for index, pod in list(self.pods.items()):
            if (status := pod.status()) is None:
                continue
            action = self.action(index, status)
            self.outcomes.append((index, status, action))
            self.disrupted.discard(index)
            del self.pods[index]
            failures = sum(each[0] == index and each[2] == "Count" for each in self.outcomes)
            if action == "Succeeded":
                self.result = "Complete"
            elif action == "FailJob" or failures > self.spec["backoffLimitPerIndex"]:
                self.result = "Failed"
            if not self.result:
                self.start(index)

    def run_until(self, condition: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.report()
            self.control()
            time.sleep(0.1)

    def finish(self, seconds: float = 60) -> str:
        """Run the Job until it ends, terminate the pods that are left, and return its result."""
        self.run_until(lambda: self.result, seconds)
        for pod in self.pods.values():
            pod.send(signal.SIGTERM)
        for pod in self.pods.values():
            pod.process.wait(30)
        return self.result

    def report(self) -> str:
        texts = [f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.txt"))]
        return "\n".join([f"ended: {self.outcomes}", *texts])

    def close(self) -> None:
        """Kill all pods, and their network."""
        for pod in self.pods.values():
            pod.send(signal.SIGKILL)
            pod.process.wait(30)
        self.network.kill()
        self.network.communicate()


def _child_of(pid: int) -> int:
    """The only child of the process, when it has one."""

    def children() -> Iterator[int]:
        while True:
            yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            time.sleep(0.01)

    return next(children())
