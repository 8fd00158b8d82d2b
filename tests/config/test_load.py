"""A command line becomes a config. User errors are in test_mistakes.py."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import config_of

from ddp_cifar.config import (
    Config,
    GroupConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    as_typed,
    fields,
    flatten,
    help_text,
    keys_with_role,
    load_config,
    to_dict,
    to_yaml,
)
from ddp_cifar.config.schema import Role
from ddp_cifar.errors import UserError
from ddp_cifar.sweep import expand

PUBLIC_KEYS = set(
    "run_dir seed precision data.name data.root "
    "train.epochs train.max_steps train.global_batch_size train.micro_batch_size optim.name "
    "optim.lr optim.weight_decay optim.step_clamp.enabled optim.step_clamp.after_epoch optim.step_clamp.limit "
    "optim.step_clamp.reset_to model.name resume device backend "
    "train.clip_norm train.log_every eval.every data.val_images checkpoint.every_epochs "
    "checkpoint.keep ".split()
)


def test_the_public_keys_keep_their_names() -> None:
    assert PUBLIC_KEYS <= {setting.key for setting in fields()}


def test_no_arguments_and_the_cifar10_recipe_both_give_the_defaults() -> None:
    assert config_of() == Config()
    assert config_of("configs/cifar10.yaml") == Config()


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_its_head_has_its_command_and_its_result(path: Path) -> None:
    config_of(str(path))
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"ddp_cifar.train {path}" in head or path.stem == "demo"
    assert "docs/results.md" in head or "No measured result" in head


def test_a_recipe_is_found_by_its_name_unless_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_path = config_of("configs/demo.yaml")
    monkeypatch.chdir(tmp_path)
    assert config_of("demo") == by_path
    assert by_path.run_dir == "runs/demo"
    Path("demo").mkdir()
    assert config_of("demo") == by_path, "a folder is no recipe"
    Path("article").write_text("train: {epochs: 7}")
    assert config_of("article").train.epochs == 7


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


@pytest.mark.parametrize(
    "text", ["10:15", "010", "on", "1e3", "null", "with space", "a=b", "x/~", "007.5", "5e4-images/run"]
)
def test_strings_are_kept_as_typed(text: str, tmp_path: Path) -> None:
    assert config_of(f"run_dir={text}").run_dir == text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"run_dir: {text}\n")
    assert config_of(str(recipe)).run_dir == text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("optim.lr=1e-3", 0.001),
        ("optim.lr=1", 1.0),
        ("train.clip_norm=null", None),
        ("train.clip_norm=2", 2.0),
        ("train.epochs=010", 10),
        ('train.epochs="3"', 3),
        ("train.profile_steps=[2, 4]", [2, 4]),
        ("train.reproducible=yes", True),
        ("tracking.name=null", None),
    ],
)
def test_numbers_are_converted_to_the_type_of_their_key(argument: str, value: object) -> None:
    key = argument.split("=")[0]
    assert flatten(to_dict(config_of(argument)))[key] == value


def test_the_printed_config_can_be_loaded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        config_of("configs/demo.yaml", "optim.lr=0.25", "--print-config")
    assert exit_.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert config_of(str(printed)) == config_of("configs/demo.yaml", "optim.lr=0.25")


@pytest.mark.parametrize("option", ["--help", "--print-config"])
def test_a_closed_pipe_causes_no_traceback(option: str) -> None:
    command = f"{sys.executable} -m ddp_cifar.train {option} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_lists_every_key_with_its_default_and_docstring() -> None:
    text = help_text()
    for setting in fields():
        assert f"  {setting.key}={as_typed(setting.default)}  (" in text
        assert setting.doc.strip(), f"{setting.key} has no docstring"


def test_a_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("recipe", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_sets_only_values_that_differ_from_the_defaults(recipe: Path) -> None:
    config_of(str(recipe))
    values = flatten(yaml.safe_load(recipe.read_text()) or {})
    defaults = flatten(to_dict(Config()))
    assert [key for key, value in values.items() if defaults[key] == value] == []


def test_the_config_round_trips_through_yaml() -> None:
    assert yaml.safe_load(to_yaml(Config())) == to_dict(Config())


def test_parameter_groups_round_trip_through_a_file_and_a_checkpoint(tmp_path: Path) -> None:
    config = config_of('optim.groups=[{match: "*.bias", weight_decay: 0}, {match: conv_layer.*, lr_factor: 1e-1}]')
    assert config.optim.groups == [GroupConfig("*.bias", weight_decay=0.0), GroupConfig("conv_layer.*", lr_factor=0.1)]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert config_of(str(tmp_path / "again.yaml")).optim == config.optim
    assert load_config([], base=to_dict(config)).optim == config.optim


LOOKS = [
    ("3", 3),
    ("-1.5", -1.5),
    ("1e-3", 0.001),
    ("0x10", 16),
    ("inf", float("inf")),
    (".inf", float("inf")),
    ("true", True),
    ("null", None),
    ("", None),
    ("[1, x]", [1, "x"]),
    ("{a: 1e3}", {"a": 1000.0}),
    *((f"'{text}'", text) for text in ("3", "1e-3", "null", "on", "")),
    *((text, text) for text in ("7e2f9c1", "1e-3,2", "5e4-images/run", "2026-11-24", "2026-13-45", "10:15", "010")),
    *((text, text) for text in ("12e45678", "0x", "0b_", "1.2.3", "1e", "=", "<<", "x y", "9" * 5000)),
]


@pytest.mark.parametrize(("text", "value"), LOOKS, ids=[text[:20] or "empty" for text, _ in LOOKS])
def test_a_user_defined_argument_gets_its_type_from_its_text(text: str, value: object, tmp_path: Path) -> None:
    assert config_of(f"model.args.v={text}").model.args == {"v": value}
    recipe = tmp_path / "recipe.yaml"
    for content in (f"model:\n  args:\n    v: {text}\n", f"model.args.v: {text}\n"):
        recipe.write_text(content)
        assert config_of(str(recipe)).model.args == {"v": value}
    recipe.write_text(to_yaml(Config(model=ModelConfig(args={"v": value}))))
    assert config_of(str(recipe)).model.args == {"v": value}, "it round-trips through the run's config.yaml"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {args: {a: 1, a: 2}}", "duplicate key a (line 1)"),
        ("optim: {lr: {{lr}}}", "a key is not a string (line 1)"),
        ("data: &data {args: {x: *data}}", "recursion"),
        ("seed: 1\n---\nseed: 2", "line 2"),
        ("seed: \x07", "not allowed"),
    ],
)
def test_a_config_file_that_is_not_yaml_gives_one_line(text: str, expected: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml is not YAML: ") as raised:
        config_of(str(recipe))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("dmo", "; known names: article, cifar10, demo, resnet18, speed; did you mean demo?"),
        ("mine", "; known names: article, cifar10, demo, resnet18, speed"),
        ("elsewhere/dmo.yaml", "; did you mean demo?"),
        ("runs/mine/config.yaml", ""),
        ("mine.yaml", ""),
    ],
)
def test_only_an_unknown_name_is_answered_with_the_names_of_all_recipes(argument: str, hint: str) -> None:
    with pytest.raises(UserError) as raised:
        config_of(argument)
    assert str(raised.value) == f"cannot read the config file {argument}: No such file or directory{hint}"


def test_an_existing_file_has_precedence_over_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("seed: 7")
    assert config_of("demo").seed == 7
    Path("demo").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot read the config file demo: it is not UTF-8 text"):
        config_of("demo")


def test_an_argument_with_an_equals_sign_that_names_a_file_is_the_config_file(tmp_path: Path) -> None:
    folder = tmp_path / "lr" / "lr=1e-3,seed=0"
    folder.mkdir(parents=True)
    shutil.copy("configs/demo.yaml", folder / "config.yaml")
    assert config_of(f"{folder}/config.yaml", "run_dir=x") == config_of("configs/demo.yaml", "run_dir=x")


IDENTITY = """
seed data.name data.args data.image_size data.channels data.mean data.std data.oversample data.val_images
data.shapes.train_images data.shapes.test_images data.shapes.seed
model.name model.args model.freeze optim.name optim.args optim.lr optim.weight_decay optim.decay_norm_bias optim.groups
optim.momentum optim.schedule optim.milestones optim.gamma optim.power optim.warmup_epochs
optim.step_clamp.enabled optim.step_clamp.after_epoch optim.step_clamp.limit optim.step_clamp.reset_to
train.global_batch_size train.micro_batch_size train.loss train.label_smoothing train.class_weights train.ema_decay
augment.crop_padding augment.flip augment.cutout augment.name augment.args augment.dtype augment.mixup augment.cutmix
"""


NON_RESULT = """
run_dir resume device backend data.root data.cache data.residency comm.timeout_s train.profile_steps
train.log_every train.max_hours train.deadline train.agree_every train.hang_timeout_s train.fingerprint_every
train.silent_timeout_s train.straggler_factor train.verify_every train.on_corruption checkpoint.on_failure
checkpoint.every_epochs checkpoint.every_steps checkpoint.every_minutes checkpoint.keep
tracking.name tracking.args tracking.group tracking.artifacts tracking.pictures_every tracking.histograms_every
tracking.graph tracking.projector tracking.hparams
"""


@pytest.mark.parametrize(
    ("role", "keys"),
    [
        ("identity", IDENTITY),
        ("non_result", NON_RESULT),
        ("machine", "device backend train.threads"),
        ("path", "run_dir resume data.root data.cache model.init"),
    ],
)
def test_each_role_has_exactly_these_keys(role: Role, keys: str) -> None:
    assert keys_with_role(role) == set(keys.split())


def test_a_tilde_at_the_start_of_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    (recipe := tmp_path / "recipe.yaml").write_text("run_dir: ~/runs/a\nmodel: {init: ~/weights.pt}\n")
    config = load_config([str(recipe), "data.root=~/images", "data.cache=/scratch/~", "tracking.group=~/a"])
    assert (config.run_dir, config.model.init) == ("/home/ann/runs/a", "/home/ann/weights.pt")
    assert (config.data.root, config.data.cache, config.tracking.group) == ("/home/ann/images", "/scratch/~", "~/a")


RANGES = [
    (Config, {"seed": 2**63}, "seed=9223372036854775808 is out of range: expected 0 to 2^63 - 1"),
    (Config, {"resume": " "}, "resume=' ' is out of range: expected auto, never or a path"),
    (TrainConfig, {"epochs": 0}, "train.epochs=0 is out of range: expected 1 or more"),
    (TrainConfig, {"max_steps": 0}, "train.max_steps=0 is out of range: expected 1 or more, or null"),
    (TrainConfig, {"clip_norm": 0.0}, "train.clip_norm=0.0 is out of range: expected a number above 0, or null"),
    (TrainConfig, {"ema_decay": 1.0}, "ema_decay=1.0 is out of range: expected a number above 0 and below 1, or null"),
    (TrainConfig, {"label_smoothing": 1.0}, "train.label_smoothing=1.0 is out of range: expected 0 to below 1"),
    (TrainConfig, {"hang_timeout_s": 1501.0}, "train.hang_timeout_s=1501.0 is out of range: expected 2 to 1500"),
    (OptimConfig, {"lr": float("nan")}, "optim.lr=nan is out of range: expected a number above 0"),
    (OptimConfig, {"weight_decay": float("inf")}, "optim.weight_decay=inf is out of range: expected 0 or more"),
]


@pytest.mark.parametrize(("section", "values", "expected"), RANGES, ids=[case[2].split()[0] for case in RANGES])
def test_a_value_out_of_range_gives_the_expected_range(section: type, values: dict[str, object], expected: str) -> None:
    name = section.__name__.removesuffix("Config").lower()
    with pytest.raises(UserError, match=f"{re.escape(expected)}$"):
        Config(**({name: section(**values)} if name else values))


def test_every_default_is_in_range() -> None:
    for setting in fields():
        setting.check(setting.default)


def test_importing_the_config_does_not_import_torch() -> None:
    program = "import sys, ddp_cifar.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
