"""Parse a command line, `[CONFIG.yaml] [key=value ...]`, into a `Config`."""

import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddp_cifar.config.schema import Config, fields, find_setting, flatten, get, keys_with_role
from ddp_cifar.config.text import by_looks, entries, help_text, parse_yaml, to_yaml, type_name
from ddp_cifar.errors import UserError, did_you_mean, first_line
from ddp_cifar.log import show
from ddp_cifar.registry import BUILT_IN, check_name, names_in
from ddp_cifar.shipped import RECIPES, recipes
from ddp_cifar.text_files import read_text


def load_config(argv: Sequence[str], base: Mapping[str, Any] | None = None) -> Config:
    """Return the config for `[CONFIG.yaml] [key=value ...]`. Precedence: defaults < base < file < arguments.

    `base` is a checkpoint's config; keys that no longer exist are ignored.
    `--help` and `--print-config` print and exit. Raises `UserError` for an unknown key (with a suggestion), a wrong type,
    a value out of range, an unknown name, or a file that cannot be read.
    """
    if "-h" in argv or "--help" in argv:
        show(help_text())
        sys.exit(0)
    arguments = [arg for arg in argv if arg != "--print-config"]
    files = _files(arguments)
    for name in files[1:] + [name for name in files if name.startswith("-")]:
        raise UserError(f"cannot read the argument {name!r}: expected [CONFIG.yaml] [key=value ...], or --help")

    layers = []
    if base is not None:
        known = {key: value for key, value in flatten(base).items() if find_setting(key)}
        for key, value in known.items():
            if "${" in str(value):  # could read this process's environment; a checkpoint has resolved values
                raise UserError(f"the checkpoint's {key}={value} is an interpolation: expected a value")
        layers.append(("the checkpoint's ", known))
    if files:
        layers.append(("", {"run_dir": f"runs/{Path(files[0]).stem}"}))
        layers.append((f"{files[0]}: ", dict(_values(read_yaml(files[0]), files[0]))))
    layers.append(("", dict(_read_argument(arg) for arg in arguments if arg not in files)))

    merged: Any = OmegaConf.structured(Config)
    for source, values in layers:
        for key, value in values.items():
            merged = _set(merged, key, value, source)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from error
    assert isinstance(config, Config)
    for key in config.tracking.hparams:
        _check_key(key, "...", "tracking.hparams: ")
    if base is None:
        config.tracking.check_secrets()
    # a checkpoint's config may name a custom optimizer or tracker that this command does not need
    for key in BUILT_IN if base is None else ():
        for name in names_in(get(config, key)):
            check_name(key, name)
    if "--print-config" in argv:
        show(to_yaml(config).rstrip())
        sys.exit(0)
    return config


def recipe_of(argv: Sequence[str]) -> str:
    """Return the name of the recipe in the arguments of `load_config`, without folders and suffix; `defaults` without one."""
    files = _files(argv)
    return Path(files[0]).stem if files else "defaults"


def _files(arguments: Sequence[str]) -> list[str]:
    """The arguments that name files. Paths of a sweep's runs contain `=`."""
    return [arg for arg in arguments if "=" not in arg or os.path.isfile(arg)]


def read_yaml(path: str, folder: str = RECIPES) -> yaml.Node | None:
    """Return the content of a YAML file as nodes, None if it is empty. Raises `UserError` if it cannot be read.

    If there is no file `path`, it may be the name of a recipe in `folder`.
    """
    known = {} if os.path.isfile(path) else recipes(folder)
    try:
        text = read_text(known.get(path, Path(path)))
    except FileNotFoundError as error:
        name = Path(path).stem
        names = f"known names: {', '.join(known)}" if name == path else ""  # not for a path
        parts = (error.strerror, names, did_you_mean(name, known))
        raise UserError(f"cannot read the config file {path}: {'; '.join(filter(None, parts))}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the config file {path}: {reason}") from error
    return parse_yaml(text, f"{path} is not YAML")


def _values(node: yaml.Node | None, path: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a file. An empty file or section sets nothing."""
    if by_looks(node) is None:
        return
    if not isinstance(node, yaml.MappingNode):
        where = f"{prefix[:-1]} in {path}" if prefix else path
        raise UserError(f"{where} contains no keys: expected lines of the form key: value")
    sections = {setting.key.rpartition(".")[0] for setting in fields()}
    for name, child in entries(node).items():
        key = f"{prefix}{name}"
        setting = find_setting(key)
        if setting and setting.is_free:
            if (value := by_looks(child)) is not None or key != setting.key:
                yield key, value
        elif isinstance(child, yaml.MappingNode) or key in sections:
            yield from _values(child, path, f"{key}.")
        else:
            yield key, _value(key, child)


def _read_argument(argument: str) -> tuple[str, Any]:
    key, text = argument.split("=", 1)
    if (setting := find_setting(key)) and setting.is_text:
        return key, text
    return key, _value(key, parse_yaml(text, f"cannot read the value of {argument!r}"))


def _value(key: str, node: yaml.Node | None) -> Any:
    """The node's text if the key determines the type, to which OmegaConf converts it; else its value by YAML's rules."""
    setting = find_setting(key)
    if setting is None or setting.is_untyped or not isinstance(node, yaml.ScalarNode):
        return by_looks(node)
    return None if node.value in ("", "~", "null", "Null", "NULL") and not setting.is_text else node.value


def _set(merged: Any, key: str, value: object, source: str) -> Any:
    """Return `merged` with this value. Raises `UserError` for an unknown key or a wrong type."""
    _check_key(key, value, source)
    if value == "???":  # OmegaConf's marker for a missing value
        raise UserError(f"{source}{key}=??? has no value: set one, or remove the key")
    nested: object = os.path.expanduser(value) if isinstance(value, str) and key in keys_with_role("path") else value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        return OmegaConf.merge(merged, nested)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        setting = find_setting(key)
        assert setting
        found = "null" if value is None else value
        raise UserError(f"{source}{key}={found} has the wrong type: expected {type_name(setting)}") from error


def _check_key(key: str, value: object, source: str) -> None:
    """Raise `UserError`, which suggests similar keys, if this is not a key of the config."""
    if find_setting(key):
        return
    keys = [setting.key for setting in fields()]
    inside = [name for name in keys if name.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{source}{key}={value}: {key} is a section; set one of its keys, such as {inside[0]}=...")
    by_last_part = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_last_part or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not near:
        last_parts = {name.rpartition(".")[2]: name for name in keys}
        near = [last_parts[part] for part in difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=1)]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all keys"
    raise UserError(f"{source}{key} is not a key of the config; {hint}")
