"""User-defined models, data, optimizers and trackers: the example of docs/extending.md, every built-in model, and user errors."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from helpers import Rows, config_of, make_trainer, random_dataset
from ranks import RankPool
from torch import nn

from ddp_cifar.config import load_config, to_dict, to_yaml
from ddp_cifar.data import DataSet, Split, build_dataset
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.models import build_model
from ddp_cifar.run.checkpoint_file import digest, load_checkpoint
from ddp_cifar.tracking import connections
from ddp_cifar.training.build import build_trainer, initial_weights

CHECKOUT = Path(__file__).parent.parent
PAGE = (CHECKOUT / "docs" / "extending.md").read_text()


def example() -> tuple[str, str]:
    """Return the first program of the page, and the command that runs it."""
    program = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    command = re.search(r"^    (torchrun (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert program
    assert command
    return program[1], command[1].replace("\\\n", " ")


def test_the_example_of_the_page_runs_unchanged(tmp_path: Path, shell: Callable[..., Any]) -> None:
    program, command = example()
    (tmp_path / "mine.py").write_text(program)
    done = shell("bash", "-c", f"{command} device=cpu", cwd=tmp_path, timeout=200)
    assert done.status == 0, done.err
    run_dir = tmp_path / "runs" / "stripes"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["test/accuracy"] for row in rows if "test/accuracy" in row]
    assert accuracies[-1] > 0.9
    assert re.findall(r"^step \d+: test/accuracy ([\d.]+)$", done.out, re.MULTILINE) == [f"{a:.3f}" for a in accuracies]
    assert done.out.splitlines().count("done") == 1
    config = load_checkpoint(run_dir / "checkpoints" / "latest.pt")["config"]
    assert config["model"]["args"] == {"width": 8}

    refused = shell("bash", "-c", f"{command} device=cpu model.args.width=9", cwd=tmp_path, timeout=100)
    assert refused.status != 0
    assert "model.args={'width': 8}, now {'width': 9}" in refused.err


BUILT_IN = {
    "cnn": ("model.name=cnn",),
    "resnet18": ("model.name=resnet18",),
    "resnet9": ("model.name=resnet9",),
    "torchvision": ("model.name=torchvision", "model.args.name=shufflenet_v2_x0_5"),
}


def two_steps(world: World, *arguments: str) -> tuple[str, Any]:
    sizes = ("train.global_batch_size=8", "train.micro_batch_size=2", "train.max_steps=2", "eval.batch_size=4")
    config = config_of("precision=fp32", "train.reproducible=true", *sizes, *arguments)
    trainer = make_trainer(world, config, random_dataset(24, test=6))
    trainer.fit(rows := Rows())
    state = trainer.state_dict()
    return digest({name: state[name] for name in ("model", "optimizer", "progress")}), rows.rows


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_model_is_bitwise_identical_on_1_and_2_ranks(ranks: RankPool, name: str) -> None:
    one, two = (ranks.run(two_steps, n, *BUILT_IN[name]) for n in (1, 2))
    assert two == one * 2
    assert one[0][1][-1]["test/loss"] > 0


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_173_962), ("resnet9", 6_573_120)])
def test_residual_networks_have_their_published_number_of_parameters(name: str, parameters: int) -> None:
    for classes, size in ((10, 32), (3, 8), (100, 64)):
        model = build_model(config_of(f"model.name={name}").model, classes, (3, size, size))
        assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)
    model = build_model(config_of(f"model.name={name}").model, 10, (3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_arguments_from_a_file_keep_their_types(tmp_path: Path) -> None:
    text = (
        "model:\n  name: mobilenet\n  args: {width: 2, rate: 1e-3, name: on, sizes: [1, 2.5, x], deep: {more: null}}\n"
    )
    (tmp_path / "file.yaml").write_text(text.replace("mobilenet", "cnn"))
    config = config_of(str(tmp_path / "file.yaml"), "model.args.width=3", "optim.args.betas=[0.8, 0.9]")
    assert config.model.args == {
        "width": 3,
        "rate": 0.001,
        "name": True,
        "sizes": [1, 2.5, "x"],
        "deep": {"more": None},
    }
    assert config.optim.args == {"betas": [0.8, 0.9]}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert config_of(str(tmp_path / "again.yaml")).model == config.model


def test_arguments_survive_a_file_and_a_checkpoint_unchanged(tmp_path: Path) -> None:
    """Strings that look like other types, and empty values, survive YAML and a checkpoint's config."""
    args = {
        "words": ["50", "on", "#fff", "a, b", "2026-11-24", "1e-3", ""],
        "empty": {},
        "nested": {"deep": {"empty": [], "null": None, "rate": 1e-3}},
    }
    (tmp_path / "first.yaml").write_text(json.dumps({"model": {"args": args}}))
    config = config_of(str(tmp_path / "first.yaml"))
    assert config.model.args == args
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert config_of(str(tmp_path / "again.yaml")).model.args == args
    assert load_config([], base=to_dict(config)).model.args == args
    assert load_config(["model.args.more=1e-3"], base=to_dict(config)).model.args == {**args, "more": 1e-3}
    assert config_of("model.args.day=2026-11-24").model.args == {"day": "2026-11-24"}


@pytest.mark.parametrize("text", ["model: {args: {3: x}}", "model: {args: [3]}", "model: {args: 3}"])
def test_args_that_are_not_a_mapping_raise_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match=r"wrong\.yaml: model\.args=.* has the wrong type: expected KEY=VALUE$"):
        config_of(str(tmp_path / "wrong.yaml"))


# -- user errors, one line each


def nothing(root: str) -> None: ...


def floats(root: str) -> DataSet:
    return DataSet(Split.of(torch.zeros(4, 1, 8, 8), torch.zeros(4)), None, ("a",))


def mislabelled(root: str) -> DataSet:
    return DataSet(Split.of(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4)), None, ("a", "b"))


def two_sizes(root: str) -> DataSet:
    splits = [Split.of(torch.zeros(4, 3, size, size, dtype=torch.uint8), torch.zeros(4)) for size in (8, 16)]
    return DataSet(*splits, ("a", "b"))


def wrong_head(num_classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes + 1))


def wrong_body(num_classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes))


def no_module(num_classes: int, image_size: int) -> str:
    return "a network"


def no_data(root: str) -> DataSet:
    raise ConnectionError("no route")


def three_outputs(num_classes: int, image_size: int) -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * image_size**2, num_classes)

        def forward(self, images: torch.Tensor) -> Any:
            logits = self.layer(images.flatten(1))
            return (logits, logits, logits) if self.training else logits

    return Network()


class Picky(torch.optim.SGD):
    def __init__(self, parameters: Any, lr: float, weight_decay: float) -> None:
        raise ValueError("not today")


half_a_network = functools.partial(wrong_head, image_size=8)


class Half:
    def __init__(self, config: dict[str, Any], run_dir: str) -> None: ...

    def log(self, scalars: dict[str, float], step: int) -> None: ...


def build(argument: str, world: World) -> None:
    """Build what a run with this argument builds."""
    config = config_of(argument)
    if argument.startswith("data"):
        build_dataset(config.data, world)
    elif argument.startswith("tracking"):
        connections(config)
    else:
        make_trainer(world, config, random_dataset(512))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "model.name=resnet19",
            "model.name=resnet19 is unknown: expected cnn, resnet18, resnet9, torchvision, ",
        ),
        ("model.name=nowhere.at:all", "cannot import nowhere.at (No module named 'nowhere')"),
        ("model.name=:all", "model.name=:all is not of the form package.module:function"),
        ("model.name=test_extending:wrong_haed", "has no wrong_haed; did you mean wrong_head?"),
        ("model.name=test_extending:CHECKOUT", "has no function CHECKOUT"),
        (
            "model.name=test_extending:wrong_head",
            "fails on images of shape (2, 3, 32, 32): it returns (2, 11) in training, expected logits",
        ),
        ("model.name=test_extending:wrong_body", "fails on images of shape (2, 3, 32, 32): mat1 and mat2 shapes"),
        ("model.name=test_extending:no_module", "returned a str: expected a torch.nn.Module"),
        (
            "model.args.width=2",
            "num_channels: int = 3) -> None does not accept the arguments (int, int, width=2)",
        ),
        (
            "optim.name=adamm",
            "expected adam, adamw, sgd, muon, or a user-defined package.module:function; did you mean adam?",
        ),
        ("optim.name=torch.optim:Adamm", "has no Adamm; did you mean Adam"),
        ("optim.args.betta=1", "optim.name=adam does not accept optim.args={'betta': 1}"),
        ("optim.name=test_extending:no_module", "does not accept the arguments"),
        ("data.name=test_extending:nothing", "returned a NoneType: expected a ddp_cifar.data.DataSet"),
        (
            "data.name=test_extending:floats",
            "the images of a split have type torch.float32 and shape (4, 1, 8, 8): expected torch.uint8 and (N, C, H, W)",
        ),
        (
            "data.name=test_extending:mislabelled",
            "the labels of the train split range from 0 to 3: expected 0 to 1 (2 classes)",
        ),
        (
            "data.name=test_extending:two_sizes",
            "the test images have the shape (3, 16, 16), the train images (3, 8, 8)",
        ),
        (
            "data.name=test_extending:no_data",
            "data.name=test_extending:no_data failed at data.root=data (ConnectionError: no route)",
        ),
        (
            "model.name=test_extending:three_outputs",
            "fails on images of shape (2, 3, 32, 32): it returns tuple in training, expected logits",
        ),
        ("optim.name=test_extending:Picky", "(not today)"),
        (
            "model.name=test_extending:half_a_network",
            "test_extending:half_a_network(num_classes: int, *, image_size: int = 8) -> ",
        ),
        (
            "tracking.name=tensorbord",
            "tracking.name=tensorbord is unknown: expected mlflow, wandb, or a user-defined package.module:function",
        ),
        (
            "tracking.name=test_extending:Half",
            "tracking.name=test_extending:Half has no close; expected log(scalars, step) and",
        ),
    ],
)
def test_a_wrong_user_defined_function_raises_an_error_of_one_line(alone: World, argument: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        build(argument, alone)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["googlenet", "vit_b_16"])
def test_torchvision_networks_that_need_special_arguments(name: str) -> None:
    model = build_model(config_of("model.name=torchvision", f"model.args.name={name}").model, 3, (3, 32, 32))
    assert model.train()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torch keeps downloads, without internet access."""

    def no_route(*arguments: Any, **named: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_route)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("channels", [3, 1])
def test_a_run_starts_from_torchvisions_pretrained_weights(hub: Path, alone: World, channels: int) -> None:
    trained = torchvision.models.squeezenet1_1().state_dict()  # 1,000 classes
    torch.save(trained, hub / "squeezenet1_1-b8a52dc0.pth")
    config = config_of(
        "model.name=torchvision",
        "model.args.name=squeezenet1_1",
        "model.args.weights=DEFAULT",
        f"data.channels={channels}",
        "train.global_batch_size=8",
    )
    images = torch.zeros(8, channels, 32, 32, dtype=torch.uint8)
    dataset = DataSet(Split.of(images, torch.arange(8) % 2), None, ("a", "b"))
    state = build_trainer(config, alone, dataset, init=initial_weights(config)).model.state_dict()
    first = trained["features.0.weight"]
    assert torch.equal(state["features.0.weight"], first if channels == 3 else first.sum(1, keepdim=True))
    assert torch.equal(state["features.12.expand3x3.weight"], trained["features.12.expand3x3.weight"])
    assert state["classifier.1.weight"].shape[0] == 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            "IMAGENET1K_V1",
            r"cannot be downloaded \(.*no route.*\): download https://\S+pth on a machine with internet access",
        ),
        (
            "IMAGENET1K_V7",
            r"weights=IMAGENET1K_V7 are not weights of torchvision's squeezenet1_1; did you mean IMAGENET1K_V1",
        ),
    ],
)
def test_pretrained_weights_that_cannot_be_had_raise_an_error_of_one_line(
    hub: Path, weights: str, message: str
) -> None:
    names = ("model.args.name=squeezenet1_1", f"model.args.weights={weights}")
    with pytest.raises(UserError, match=message):
        initial_weights(config_of("model.name=torchvision", *names))
