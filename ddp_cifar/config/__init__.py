"""The config: all settings, and how a command line becomes a `Config`.

    python -m ddp_cifar.train configs/demo.yaml optim.lr=0.002 run_dir=runs/faster

A YAML file overrides the dataclass defaults; `key=value` arguments override the file.
"""

from ddp_cifar.config.load import load_config, read_yaml, recipe_of
from ddp_cifar.config.schema import (
    PRESETS,
    AugmentConfig,
    CheckpointConfig,
    CommConfig,
    Config,
    DataConfig,
    EvalConfig,
    GroupConfig,
    ImageShape,
    ModelConfig,
    OptimConfig,
    ShapesConfig,
    StepClampConfig,
    TrackingConfig,
    TrainConfig,
    fields,
    flatten,
    get,
    keys_with_role,
    result_keys,
    setting_of,
    to_dict,
)
from ddp_cifar.config.text import as_argument, as_typed, by_looks, entries, help_text, parse_yaml, short_names, to_yaml

__all__ = [
    "PRESETS",
    "AugmentConfig",
    "CheckpointConfig",
    "CommConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GroupConfig",
    "ImageShape",
    "ModelConfig",
    "OptimConfig",
    "ShapesConfig",
    "StepClampConfig",
    "TrackingConfig",
    "TrainConfig",
    "as_argument",
    "as_typed",
    "by_looks",
    "entries",
    "fields",
    "flatten",
    "get",
    "help_text",
    "keys_with_role",
    "load_config",
    "parse_yaml",
    "read_yaml",
    "recipe_of",
    "result_keys",
    "setting_of",
    "short_names",
    "to_dict",
    "to_yaml",
]
