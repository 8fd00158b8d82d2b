"""Run a function on n ranks, each a process in one group, and return the result of every rank."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ddp_cifar.distributed.rendezvous import open_world

TIMEOUT_S = 180


class RankPool:
    """Up to `size` processes that are reused for all tests, because every new process takes seconds to import torch."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.workers: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, device: str = "cpu") -> list[Any]:
        """Run `function(world, *args)` on all ranks, on `device`: cpu or cuda.

        One rank on a GPU uses NCCL. Several use gloo: they may share a GPU, which NCCL does not support. Raises
        `AssertionError` with the traceback of a failed rank.
        """
        self._start(world_size)
        # the rendezvous is as under torchrun: a store of another process, on a free port
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, pipe) in enumerate(self.workers[:world_size]):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            pipe.send_bytes(pickle.dumps((environment, device, function, args)))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(results) < world_size:
            waiting = {self.workers[rank][1]: rank for rank in range(world_size) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            failure = None if ready else f"ranks {sorted(waiting.values())} gave no result within {TIMEOUT_S} s"
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    succeeded, value = False, "the process exited"
                if succeeded:
                    results[rank] = value
                else:
                    failure = f"rank {rank} failed:\n{value}"
            if failure:
                self.stop()
                raise AssertionError(failure)
        return [results[rank] for rank in range(world_size)]

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []

    def _start(self, world_size: int) -> None:
        assert world_size <= self.size
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < world_size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic, if a test asks for it: cuBLAS reads it only once
    while True:
        try:
            environment, device, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            backend = "auto" if environment["WORLD_SIZE"] == 1 else "gloo"
            with open_world(device, backend) as world:
                assert world.device.type == device
                outcome = (True, function(world, *args))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(outcome))
