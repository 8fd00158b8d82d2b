"""Measure the training speed of a recipe, and compare it with what this machine can do.

    [torchrun ...] python -m ddp_cifar.benchmark [CONFIG.yaml] [key=value ...]

Runs the Trainer of the config on random images, so that nothing is downloaded. Four contenders take turns in short slices, so
that fluctuations of the machine's speed affect all of them: training, the same steps without the exchange of gradients, the
bare computation on one batch, and a matrix product.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_cifar.command import Arguments, check_counts, megabytes, run_command, span, writing
from ddp_cifar.config import load_config
from ddp_cifar.errors import UserError
from ddp_cifar.log import show


def main(argv: Sequence[str]) -> int:
    """Measure the config of `argv`, print the table on rank 0, and return the exit status."""
    parser = Arguments("ddp_cifar.benchmark", __doc__)
    parser.add_argument("arguments", metavar="CONFIG.yaml key=value", nargs="*", help="same as for ddp_cifar.train")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed slices of each contender (default: 7)")
    parser.add_argument("--steps", type=int, help="steps per slice (default: as many as take about a second)")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "rounds", "steps")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: the folder {options.json.parent} does not exist: create it first")
    config = load_config(options.arguments)

    from ddp_cifar.distributed.rendezvous import open_world  # imports torch, which takes seconds
    from ddp_cifar.training.benchmarking import measure
    from ddp_cifar.training.build import set_up_kernels

    with open_world(config.device, config.backend) as world:
        set_up_kernels(config.train, world)
        result = measure(config, world, options.rounds, options.steps)
        if world.is_main:
            show(table(result))
            if options.json:
                with writing(options.json):
                    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def table(result: Mapping[str, Any]) -> str:
    """Format the results as a table in Markdown."""
    milliseconds = {name: f"{1000 * seconds:.2f}" for name, seconds in result["phases_s"].items()}
    exposed = result["exposed_communication"]
    count = result["num_micro_batches"]
    sizes = span(result["global_batch_size"] // count, result["micro_batch_size"])
    rows = {
        "machine": f"{result['world_size']} ranks on {', '.join(result['hosts'])}; {result['device']}, {result['backend']}, "
        f"torch {result['torch']}, {result['threads']} CPU threads per rank",
        "recipe": f"{result['model']}, {result['precision']}, compile {result['compile']}, "
        f"{result['global_batch_size']} images per step in {count} micro-batches of {sizes}, "
        f"{span(count // result['world_size'], result['grad_accum_steps'])} per rank",
        "images/s": f"{result['images_per_s']:,.0f} ({result['images_per_s_min']:,.0f} - {result['images_per_s_max']:,.0f}), "
        f"median of {result['rounds']} slices of {result['steps_a_slice']} steps",
        "time per step": f"{1000 * result['step_s']:.2f} ms: "
        + ", ".join(f"{name} {ms}" for name, ms in milliseconds.items()),
        "waiting for data": f"{result['data_share']:.1%} of a step",
        "exposed communication": "not measured with one rank or train.reproducible"
        if exposed is None
        else f"{exposed:.1%} of a step",
        "speed relative to the bare computation": f"{result['of_computation']:.1%}",
        "model FLOP/s": f"{result['flops_per_s'] / 1e12:,.3f} T, {result['flops_an_image'] / 1e9:.3f} G per image",
        "utilization": f"{result['utilization']:.1%} of the {result['matrix_flops_per_s'] / 1e12:,.3f} T of a matrix product "
        f"in {result['precision']} on this machine (the bare computation: {result['computation_utilization']:.1%})",
        "peak memory": f"{megabytes(result['peak_memory'])} per rank",
        "warm-up": f"{result['warm_up_s']:.1f} s, not included above",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


if __name__ == "__main__":
    run_command(main)
