"""Training without torch.compile does not load torch._dynamo, which still works when it is used."""

import subprocess
import sys
from pathlib import Path

import pytest
from launched import environment_of

TRAIN = """
import os, sys
from ddp_cifar.training.dynamo import load_dynamo_on_demand

def done(status):
    print("status", status, "loaded", "sympy" in sys.modules)
    sys.stdout.flush()
    exit(status)

exit, os._exit = os._exit, done
from ddp_cifar.command import run_command
from ddp_cifar.train import main
run_command(main)
"""
TINY = "data.name=shapes data.shapes.train_images=40 data.shapes.test_images=20 train.max_steps=2 train.global_batch_size=16"


def test_training_loads_no_compiler(tmp_path: Path) -> None:
    more = "train.micro_batch_size=8 train.reproducible=true train.ema_decay=0.9 optim.name=muon"
    arguments = f"device=cpu {TINY} {more} run_dir={tmp_path}/run".split()
    assert "status 0 loaded False" in _python(TRAIN, *arguments)


COMPILE = """
import sys, torch
from ddp_cifar.training.dynamo import load_dynamo_on_demand

load_dynamo_on_demand()
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
def step(x):
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    return model.weight.detach().clone()
step(torch.ones(1, 2))
assert "sympy" not in sys.modules
{use}
assert "sympy" in sys.modules and torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.__file__
compiled = torch.compile(step, backend="eager")
before = model.weight.detach().clone()
assert not torch.equal(compiled(torch.ones(1, 2)), before)
print("compiled")
"""


@pytest.mark.parametrize(
    "use",
    [
        "torch.compile(model, backend='eager')(torch.ones(1, 2))",
        "import torch._dynamo.config as config; assert config.optimize_ddp in (True, 'ddp_optimizer')",
        "import inspect; inspect.getmodule(len); assert 'sympy' not in sys.modules; torch._dynamo.utils.counters",
    ],
)
def test_the_compiler_is_loaded_when_it_is_used(use: str) -> None:
    assert "compiled" in _python(COMPILE.format(use=use))


def _python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment_of(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
