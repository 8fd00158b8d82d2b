"""What makes training fast, and what says how fast it is: residency, communication, compilation, benchmark, scaling, profile."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rows, config_of, largest_difference, make_trainer, random_dataset
from ranks import RankPool
from test_mistakes import TINY
from torch import nn

import ddp_cifar.train
from ddp_cifar import scaling
from ddp_cifar.benchmark import model_flops
from ddp_cifar.data.dataset import place_of
from ddp_cifar.data.loader import EvalBatch
from ddp_cifar.data.sampler import StepSampler, plan_batches
from ddp_cifar.distributed import World
from ddp_cifar.models.cnn import CNN
from ddp_cifar.trainer import Trainer

Shell = Callable[..., Any]

SMALL = ("train.global_batch_size=16", "train.micro_batch_size=4", "train.epochs=1", "train.log_every=1")


def trained(world: World, *arguments: str, images: int = 44) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The weights after an epoch, and the rows."""
    trainer = make_trainer(world, config_of(*SMALL, *arguments), random_dataset(images, test=10))
    rows = Rows()
    trainer.fit(rows)
    return {name: value.cpu() for name, value in trainer.model.state_dict().items()}, rows.rows


# -- residency


def test_images_that_fit_are_on_the_device(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = random_dataset(10, val=2)  # 12 images in one tensor
    size = dataset.train.images.numel()
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    for free, place in ((2 * size, cuda), (2 * size - 1, cpu)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * free))
        assert place_of((dataset.train, dataset.val, None), cuda, "auto") == place
    assert place_of([dataset.train], cuda, "host") == cpu
    assert place_of([dataset.train], cuda, "device") == cuda
    assert place_of([dataset.train], cpu, "auto") == cpu


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_images_from_the_host_give_the_same_bits(ranks: RankPool, precision: str) -> None:
    arguments = (f"precision={precision}", "train.deterministic=true")
    (device,) = ranks.run(trained, 1, "device=cuda", "data.residency=device", *arguments)
    (host,) = ranks.run(trained, 1, "device=cuda", "data.residency=host", *arguments)
    assert largest_difference(device[0], host[0]) == 0
    assert device[1] == host[1]


@pytest.mark.gpu
def test_on_a_gpu_a_batch_out_of_turn_is_the_right_one(ranks: RankPool) -> None:
    (right,) = ranks.run(_batches_out_of_turn, 1)
    assert right


def _batches_out_of_turn(world: World) -> bool:
    trainer = make_trainer(world, config_of(*SMALL, "device=cuda", "data.residency=host"), random_dataset(44))
    inturn = [micro.sample_ids.tolist() for step in trainer.train.steps(0) for micro in step]
    steps = list(trainer.train.steps(0))
    outofturn = [micro.sample_ids.tolist() for step in reversed(steps) for micro in step]
    return sorted(inturn) == sorted(outofturn) and inturn != outofturn


# -- the step


@pytest.mark.gpu
@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_nothing_waits_for_the_device_between_rows(ranks: RankPool, residency: str, precision: str) -> None:
    ranks.run(_steps_that_do_not_wait, 1, residency, precision)


def _steps_that_do_not_wait(world: World, residency: str, precision: str) -> None:
    arguments = ("device=cuda", f"data.residency={residency}", f"precision={precision}", "train.log_every=1000")
    trainer = make_trainer(world, config_of(*SMALL, *arguments), random_dataset(16 * 8))
    steps = trainer.train.steps(0)
    for _ in range(2):
        trainer.train_step(next(steps))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            trainer.train_step(next(steps))
            trainer.poll()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_step_is_the_same_step_on_two_ranks(ranks: RankPool) -> None:
    """On the CPU, where train.compile is refused as it gains nothing: with DDP, accumulation, a short batch, averages."""
    eager, compiled = (ranks.run(_compiled_on_the_cpu, 2, mode) for mode in ("off", "default"))
    assert compiled[0] == pytest.approx(eager[0], abs=1e-4)
    assert compiled[0] != eager[0], "other kernels"
    assert compiled[0] == compiled[1]


def _compiled_on_the_cpu(world: World, mode: str) -> list[float]:
    ddp_cifar.train.COMPILED_ON.add("cpu")
    try:
        return _first_losses(world, "device=cpu", "train.ema_decay=0.9", f"train.compile={mode}")
    finally:
        ddp_cifar.train.COMPILED_ON.remove("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu_a_compiled_step_is_the_same_step(ranks: RankPool, mode: str) -> None:
    """To rounding, with a short last batch, dropout apart (which torch.compile draws in its own order)."""
    (eager,) = ranks.run(_first_losses, 1, "device=cuda", "train.compile=off")
    (compiled,) = ranks.run(_first_losses, 1, "device=cuda", f"train.compile={mode}")
    assert compiled == pytest.approx(eager, abs=1e-3)


def _first_losses(world: World, *arguments: str) -> list[float]:
    config = config_of(*SMALL, "precision=fp32", "model.name=resnet9", "optim.lr=1e-5", *arguments)
    trainer = make_trainer(world, config, random_dataset(44, test=10))
    rows = Rows()
    trainer.fit(rows)
    return [float(row[tag]) for row in rows.rows for tag in ("train/loss", "test/loss") if tag in row]


@pytest.mark.parametrize(
    ("batch", "micro", "sizes"), [(512, 64, [64, 42]), (128, 32, [32, 20]), (512, 512, [512, 336]), (500, 50, [50])]
)
def test_few_sizes_are_compiled_and_they_are_those_of_an_epoch(batch: int, micro: int, sizes: list[int]) -> None:
    train = config_of(f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}").train
    plan = plan_batches(train, 1, 50_000)
    assert plan.micro_batch_sizes() == sizes
    steps = StepSampler(plan, 0, seed=0).steps(0)
    assert sorted({len(m.indices) for step in steps for m in step.micro_batches}, reverse=True) == sizes


def test_torch_compile_needs_a_gpu(train: Callable[..., Any], tmp_path: Path) -> None:
    outcome = train(*TINY, "train.compile=default", "device=cpu", f"run_dir={tmp_path}/run")
    assert outcome.status == 2
    assert "train.compile=default needs a GPU, found device cpu: use off" in outcome.err


# -- communication


def rounded_gradients(world: World, hook: str) -> tuple[bool, float]:
    """Whether all ranks have the same gradients with a hook, and their distance from those without one, by their norm."""
    norms = []
    for name in ("none", hook):
        torch.manual_seed(0)
        ddp = world.wrap(nn.Linear(1000, 1000), bucket_mb=1, hook=name)
        torch.manual_seed(world.rank)
        ddp(torch.randn(8, 1000)).square().sum().backward()
        norms.append(torch.cat([p.grad.flatten() for p in ddp.parameters() if p.grad is not None]))
    exact, rounded = norms
    prints = world.gather([int(rounded.view(torch.int32).long().sum())])
    return len({value for (value,) in prints}) == 1, float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize(("hook", "bits"), [("fp16", 11), ("bf16", 8)])
def test_a_hook_rounds_gradients_alike_on_all_ranks(ranks: RankPool, hook: str, bits: int) -> None:
    for equal, distance in ranks.run(rounded_gradients, 2, hook):
        assert equal
        assert 2.0 ** -(bits + 3) < distance < 2.0**-bits


def buckets(world: World, *arguments: str) -> int:
    config = config_of(*SMALL, "model.name=cnn", "train.global_batch_size=16", *arguments)
    trainer = make_trainer(world, config, random_dataset(44))
    sent = []

    def count(_, bucket):  # type: ignore[no-untyped-def]  # DDP takes no other annotation than its own
        sent.append(bucket.buffer().numel())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    trainer.ddp.register_comm_hook(None, count)  # type: ignore[union-attr, operator]
    trainer.train_step(next(trainer.train.steps(0)))
    return len(sent)


def test_small_buckets_make_more_messages(ranks: RankPool) -> None:
    (large,), (small,) = (ranks.run(buckets, 1, f"comm.bucket_mb={size}") for size in (100, 1))
    assert large <= 2 < small


def test_training_goes_on_with_a_hook(ranks: RankPool) -> None:
    exact, rounded = (ranks.run(trained, 2, f"comm.hook={hook}")[0][1] for hook in ("none", "bf16"))
    assert [row["train/loss"] for row in rounded[:1]] == [row["train/loss"] for row in exact[:1]]
    assert rounded[-1]["fingerprint"] != exact[-1]["fingerprint"]


# -- the benchmark


def test_the_flops_of_the_cnn_are_those_by_hand() -> None:
    """Two for each multiply-add; backward takes two products where forward takes one, but for the first layer's images."""
    convolutions = [(3, 32, 32), (32, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8)]
    forward = [2 * 9 * c_in * c_out * size**2 for c_in, c_out, size in convolutions]
    forward += [2 * a * b for a, b in ((4096, 1024), (1024, 512), (512, 10))]
    assert model_flops(CNN(), (3, 32, 32)) == 3 * sum(forward) - forward[0]


@pytest.mark.slow
def test_the_benchmark_reports_what_it_measured(shell: Shell, tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    small = ("train.global_batch_size=16", "train.micro_batch_size=4", "train.epochs=2")
    options = ("--rounds", "2", "--steps", "2", "--json", str(result_file))
    done = shell("torchrun", "--standalone", "--nproc_per_node=2", "-m", "ddp_cifar.benchmark", *small, *options)
    assert done.status == 0, done.err
    result = json.loads(result_file.read_text())
    assert (result["world_size"], result["grad_accum_steps"], result["rounds"]) == (2, 2, 2)
    assert set(result["rates"]) == {
        "training",
        "computation",
        "without exchange",
        "matrix product 1024",
        "matrix product 2048",
    }
    assert all(min(rates) > 0 and len(rates) == 2 for rates in result["rates"].values())
    assert result["images_per_s_min"] <= result["images_per_s"] <= result["images_per_s_max"]
    assert sum(result["phases_s"].values()) == pytest.approx(result["step_s"], rel=0.5)
    assert 0 < result["utilisation"] < 1
    assert f"| images/s | {result['images_per_s']:,.0f} (" in done.out
    alone = shell("python", "-m", "ddp_cifar.benchmark", *small, "--rounds", "1", "--steps", "1")
    assert "| exposed communication | none, with one rank" in alone.out, alone.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rounds", "0"], "--rounds 0 is out of range"),
        (["--json", "nowhere/a.json"], "there is no folder nowhere"),
        (["train.epoch=3"], "did you mean train.epochs"),
    ],
)
def test_a_mistake_in_the_benchmarks_arguments(shell: Shell, arguments: list[str], expected: str) -> None:
    done = shell("python", "-m", "ddp_cifar.benchmark", *arguments)
    assert done.status == 2
    assert len(done.err.splitlines()) == 1
    assert expected in done.err


def test_scaling_reports_efficiency(tmp_path: Path) -> None:
    for kind, ranks, rate in (("weak", 1, 100), ("weak", 2, 180), ("weak", 4, 300), ("strong", 2, 200)):
        result = {
            "world_size": ranks,
            "images_per_s": rate,
            "images_per_s_min": rate - 5,
            "images_per_s_max": rate + 5,
            "global_batch_size": 128 * ranks,
            "step_s": 128 * ranks / rate,
            "exposed_communication": None if ranks == 1 else 0.1,
            **dict.fromkeys(("model", "precision", "device", "backend", "threads", "torch"), "x"),
        }
        (tmp_path / f"{kind}-{ranks}.json").write_text(json.dumps(result))
    assert scaling.main([str(tmp_path)]) == 0
    text = (tmp_path / "scaling.md").read_text()
    assert "| 1 | 128 | 100 (95 - 105) | 1.00 | 1280.0 ms | - |" in text
    assert "| 4 | 128 | 300 (295 - 305) | 0.75 | 1706.7 ms | 10.0% |" in text
    assert "| 2 | 128 | 200 (195 - 205) | 1.00 |" in text
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "weak-1.json").write_text("{")
    with pytest.raises(Exception, match=r"weak-1\.json is not what the benchmark writes"):
        scaling.read(tmp_path)


@pytest.mark.slow
def test_scaling_over_one_and_two_ranks(shell: Shell, tmp_path: Path) -> None:
    options = ("train.max_steps=null", "--rounds", "1", "--steps", "1")
    done = shell("launch/scaling.sh", str(tmp_path / "out"), *options, MAX_RANKS="2", IMAGES="8", timeout=300)
    assert done.status == 0, done.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"weak-1.json", "weak-2.json", "strong-1.json", "strong-2.json", "scaling.md", "scaling.png"}
    strong = json.loads((tmp_path / "out" / "strong-2.json").read_text())
    assert (strong["global_batch_size"], strong["micro_batch_size"], strong["threads"]) == (16, 8, 1)


# -- the profile


def test_a_profile_of_some_steps(train: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("train.global_batch_size=4", "train.micro_batch_size=2", "train.max_steps=4", "device=cpu")
    outcome = train(*TINY, *arguments, "train.profile_steps=[2,3]", f"run_dir={tmp_path}/run")
    assert outcome.status == 0, outcome.err
    assert "the longest kernels of the profile" in outcome.err + outcome.out
    (path,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "ProfilerStep#0" for event in events) == 0
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step")]
    assert len(steps) == 2


def test_evaluation_batches_are_complete(alone: World) -> None:
    trainer: Trainer = make_trainer(alone, config_of(*SMALL), random_dataset(44, test=10))
    assert trainer.test
    batches = list(trainer.test.evaluation_batches(alone, 4))
    assert all(isinstance(batch, EvalBatch) for batch in batches)
    assert [i for batch in batches if batch for i in batch.indices.tolist()] == list(range(10))
