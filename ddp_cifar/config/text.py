"""The config as text: values from YAML and back, `key=value` arguments, and the text of `--help`."""

import contextlib
import dataclasses
import itertools
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import yaml

from ddp_cifar.config.schema import Config, Setting, fields, find_setting, to_dict
from ddp_cifar.errors import UserError, first_line
from ddp_cifar.registry import BUILT_IN
from ddp_cifar.shipped import recipes

MAX_NODES = 100_000
"""The most values in a YAML text. A recipe has tens, a sweep perhaps thousands."""


def parse_yaml(text: str, problem: str) -> yaml.Node | None:
    """Parse YAML into nodes, which keep each value's original text; None for an empty text.

    Raises `UserError`, which begins with `problem`, if it is not YAML, has a duplicate key, or has too many values.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(node, itertools.count(1))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{problem}: {what}" + (f" (line {mark.line + 1})" if mark else "")) from error
    return node


def _check_nodes(node: yaml.Node | None, counter: Iterator[int]) -> None:
    """Count the nodes as often as aliases repeat them: nested aliases can turn a few lines into billions of values."""
    if node is None:
        return
    if next(counter) > MAX_NODES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MAX_NODES:,} values, counting aliases", problem_mark=node.start_mark
        )
    if not re.fullmatch(r"tag:yaml\.org,2002:\w+", node.tag):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not allowed", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_nodes(child, counter)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not a string", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=node.start_mark)
            seen.add(key.value)
            _check_nodes(child, counter)


def entries(node: yaml.MappingNode) -> dict[str, yaml.Node]:
    """The child nodes by key."""
    return {key.value: child for key, child in node.value}


def by_looks(node: yaml.Node | None) -> Any:
    """The value of a node whose key does not determine its type.

    1e-3 is a number; 10:15, 010, a date and anything in quotes are strings.
    """
    if isinstance(node, yaml.MappingNode):
        return {by_looks(key): by_looks(child) for key, child in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [by_looks(child) for child in node.value]
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        return None
    if node.tag.endswith(":bool"):
        return node.value.lower() in ("true", "yes", "on")
    number = None if node.style else _number(node.value)
    return node.value if number is None else number


def _number(text: str) -> int | float | None:
    """Parse `text` as a number. None if it is none, for 010, and for 12e34567, which is more likely a name than infinity."""
    with contextlib.suppress(ValueError):
        return int(text, base=0)
    if re.fullmatch(r"[-+]?\.?(inf|nan)", text, re.IGNORECASE):
        return float(text.replace(".", ""))
    with contextlib.suppress(ValueError):
        if re.search("[.eE]", text) and math.isfinite(number := float(text)):
            return number
    return None


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `by_looks` would read as another type."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if _number(text) is None else "'"
    ),
)


def to_yaml(config: Config) -> str:
    """The config as a YAML file that `load_config` can read."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


def as_argument(key: str, node: yaml.ScalarNode) -> str:
    """`key=value` for a command line: the text of the file, quoted if needed where the key does not determine the type."""
    setting = find_setting(key)
    if setting is None or not setting.is_untyped:
        return f"{key}={node.value}"
    value = yaml.dump(by_looks(node), Dumper=_Dumper, width=math.inf).removesuffix("...\n").strip()
    return f"{key}={value}"


def as_typed(value: object) -> str:
    """The value as typed on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, such as `lr` for `optim.lr`, if it is unique among `keys`; else the whole key."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: short if list(last.values()).count(short) == 1 else key for key, short in last.items()}


def help_text() -> str:
    """The text of `--help`: every key with its type, default and docstring."""
    lines = ["usage: [torchrun ...] python -m ddp_cifar.COMMAND [CONFIG.yaml] [key=value ...]", ""]
    lines += [
        f"  CONFIG.yaml     a file, or the name of a recipe: {', '.join(recipes())}",
        "  --help          print this text and exit",
        "  --print-config  print the resolved config as YAML and exit",
        "  --dry-run [--nodes N] [--nproc-per-node N]",
        "                  (train) check data, batches and memory before the run is queued; needs no GPU",
        "",
        "keys and defaults:",
        "",
    ]
    for setting in fields():
        names = BUILT_IN.get(setting.key)
        kind = f"one of {', '.join(names)}" if names else type_name(setting)
        lines.append(f"  {setting.key}={as_typed(setting.default)}  ({kind})")
        lines += textwrap.wrap(" ".join(setting.doc.split()), 112, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def type_name(setting: Setting) -> str:
    """A key's type, for `--help` and error messages."""
    return setting.range.expected if setting.type is Any else _type_name(setting.type)


def _type_name(annotation: Any) -> str:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return "KEY=VALUE"
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, options))
    if typing.get_origin(annotation) is types.UnionType:
        return f"{_type_name(options[0])} or null"
    if dataclasses.is_dataclass(annotation):
        return f"{{{', '.join(f'{name}: {_type_name(kind)}' for name, kind in typing.get_type_hints(annotation).items())}}}"
    return f"[{_type_name(options[0])}, ...]" if options else str(annotation.__name__)
