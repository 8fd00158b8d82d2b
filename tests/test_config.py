"""How a command line becomes a config. Mistakes are in test_mistakes.py."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from helpers import config_of

from ddp_cifar.config import Config, fields, flatten, help_text, to_dict, to_yaml
from ddp_cifar.sweep import expand
from ddp_cifar.train import TABLES

PUBLIC_KEYS = set(
    "run_dir seed precision data.name data.root "
    "train.epochs train.max_steps train.global_batch_size train.micro_batch_size optim.name "
    "optim.lr optim.weight_decay optim.step_clamp.enabled optim.step_clamp.after_epoch optim.step_clamp.limit "
    "optim.step_clamp.reset_to model.name resume device backend "
    "train.clip_norm train.log_every eval.every data.val_images checkpoint.every_epochs "
    "checkpoint.keep ".split()
)


def test_the_public_keys_keep_their_names() -> None:
    assert PUBLIC_KEYS <= {key for key, *_ in fields()}


def test_no_argument_means_the_defaults_and_so_does_the_cifar10_recipe() -> None:
    assert config_of() == Config()
    assert config_of("configs/cifar10.yaml") == Config()


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_its_head_says_how_it_is_started_and_what_was_measured(path: Path) -> None:
    config_of(str(path))
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"ddp_cifar.train {path}" in head or path.stem == "demo"
    assert "docs/results.md" in head or "ot yet run" in head


def test_every_sweep_is_valid() -> None:
    for path in Path("configs", "sweeps").glob("*.yaml"):
        assert len(expand(path, [])) > 1


def test_defaults_are_overridden_by_the_file_and_the_file_by_arguments(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim:\n  lr: 0.5\n  weight_decay: 1e-4\ntrain:\n")
    config = config_of(str(recipe), "optim.lr=2e-3")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.momentum) == (0.002, 1e-4, 0.9)
    assert config.run_dir == "runs/mine"
    assert config_of("run_dir=elsewhere", str(recipe)).run_dir == "elsewhere"


@pytest.mark.parametrize("text", ["10:15", "010", "on", "1e3", "null", "with space", "a=b", "~/x", "007.5"])
def test_text_is_taken_as_typed(text: str, tmp_path: Path) -> None:
    assert config_of(f"run_dir={text}").run_dir == text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"run_dir: {text}\n")
    assert config_of(str(recipe)).run_dir == text


@pytest.mark.parametrize(
    ("argument", "value"),
    [("optim.lr=1e-3", 0.001), ("optim.lr=1", 1.0), ("train.clip_norm=null", None), ("train.clip_norm=2", 2.0)],
)
def test_numbers_are_read_as_their_keys_type(argument: str, value: object) -> None:
    key = argument.split("=")[0]
    assert flatten(to_dict(config_of(argument)))[key] == value


def test_the_printed_config_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        config_of("configs/demo.yaml", "optim.lr=0.25", "--print-config")
    assert exit_.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert config_of(str(printed)) == config_of("configs/demo.yaml", "optim.lr=0.25")


def test_help_has_every_key_with_its_default_and_documentation() -> None:
    text = help_text(TABLES)
    for key, _, default, doc in fields():
        assert (
            f"  {key}={'null' if default is None else str(default).lower() if default in (True, False) else default}"
            in text
        )
        assert doc.strip(), f"{key} has no docstring"


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("recipe", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_holds_only_what_differs_from_the_defaults(recipe: Path) -> None:
    config_of(str(recipe))
    values = flatten(yaml.safe_load(recipe.read_text()) or {})
    defaults = flatten(to_dict(Config()))
    assert [key for key, value in values.items() if defaults[key] == value] == []


def test_the_config_survives_yaml() -> None:
    assert yaml.safe_load(to_yaml(Config())) == to_dict(Config())
