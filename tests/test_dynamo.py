"""Training imports no compiler, which works as usual when something else imports it."""

import subprocess
import sys
from pathlib import Path

import pytest
from launched import environment_of

TRAIN = """
import os, sys
from ddp_cifar.command import run_command
from ddp_cifar.train import main

def done(status):
    print("status", status, "imported", "torch._dynamo" in sys.modules)
    sys.stdout.flush()
    exit(status)

exit, os._exit = os._exit, done
run_command(main)
"""
TINY = "data.name=shapes data.shapes.train_images=40 data.shapes.test_images=20 train.max_steps=2 train.global_batch_size=16"


def test_training_imports_no_compiler(tmp_path: Path) -> None:
    more = "train.micro_batch_size=8 train.reproducible=true train.ema_decay=0.9 optim.name=muon"
    arguments = f"device=cpu {TINY} {more} run_dir={tmp_path}/run".split()
    assert "status 0 imported False" in _python(TRAIN, *arguments)


USE = """
import sys, torch
from ddp_cifar.config import load_config
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.dynamo import MARK, without_dynamo
from ddp_cifar.training.optim import build_optimizer

optimizer_code = torch.optim.Optimizer.zero_grad.__wrapped__
with open_world("cpu") as world:
    model = world.wrap(torch.nn.Linear(2, 1))
    optimizer = build_optimizer(model, load_config(["optim.lr=0.1"]).optim)
    def step(x):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        return model.module.weight.detach().clone()
    step(torch.ones(1, 2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert "torch._dynamo" not in sys.modules and "_dynamo" not in vars(torch) and hasattr(optimizer_code, MARK)
    {use}
    assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.__file__
    assert torch._dynamo.convert_frame.config is torch._dynamo.config is sys.modules["torch._dynamo.config"]
    before = step(torch.ones(1, 2))
    assert getattr(optimizer_code, MARK).__module__.startswith("torch._dynamo"), "it is excluded from compilation"
    compiled = torch.compile(step, backend="eager")
    assert not torch.equal(compiled(torch.ones(1, 2)), before)
    assert isinstance(torch.compiler.disable(torch.nn.Linear(2, 1)), torch.nn.Module)
print("works")
"""


@pytest.mark.parametrize(
    "use",
    [
        "torch.compile(torch.nn.Linear(2, 1), backend='eager')(torch.ones(1, 2))",
        "import torch._dynamo.config as config; assert config.optimize_ddp in (True, 'ddp_optimizer')",
        "without_dynamo()(lambda: torch._dynamo.utils.get_optimize_ddp_mode() and torch._dynamo.reset())()",
    ],
)
def test_the_compiler_works_if_it_is_imported_after_the_first_step(use: str) -> None:
    """By a model, by a user, or by code of torch for which it should not be needed."""
    assert "works" in _python(USE.format(use=use))


def _python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment_of(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
