"""The config reference, docs/config.md, generated from the schema: `python -m ddp_cifar.config.reference > docs/config.md`."""

import itertools
import textwrap
from typing import Any

from ddp_cifar.config.schema import Range, Setting, fields
from ddp_cifar.config.text import as_typed, type_name
from ddp_cifar.registry import BUILT_IN

INTRODUCTION = """\
# Config reference

Generated from [ddp_cifar/config/schema.py](../ddp_cifar/config/schema.py); do not edit. To regenerate:

    python -m ddp_cifar.config.reference > docs/config.md

Set a key in a YAML file or as `key=value` on the command line. The command line overrides the file. The file overrides
the defaults below, which are the CIFAR-10 recipe. `--print-config` prints the resolved config.

A key marked **fixed** is part of a run's identity: resuming with another value is rejected. All other keys may change
when a run resumes.
"""


def reference() -> str:
    """The page, as Markdown."""
    lines = [INTRODUCTION]
    for section, settings in itertools.groupby(fields(), key=lambda setting: setting.key.rpartition(".")[0]):
        lines += [f"## {section or 'Top level'}", ""]
        lines += ["\n".join(_entry(setting)) for setting in settings]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _entry(setting: Setting) -> list[str]:
    names = BUILT_IN.get(setting.key)
    kind = f"one of {', '.join(names)}, or package.module:name" if names else type_name(setting)
    if setting.range != Range() and setting.type is not Any:
        kind += f"; {setting.range}"
    default = f"`{as_typed(setting.default)}`" if setting.default != {} else "empty"
    fixed = ", **fixed**" if "identity" in setting.roles else ""
    text = " ".join(setting.doc.split()).replace("*", r"\*")
    return [
        f"- **`{setting.key}`** — default {default}{fixed} ({kind})",
        *textwrap.wrap(text, 112, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
    ]


if __name__ == "__main__":
    print(reference(), end="")
