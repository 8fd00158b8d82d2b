"""Are results bitwise the same if a run is repeated, resumed, or run on two ranks? Prints "equal" or "different" for each.

    python benchmarks/repeats.py [--device cuda] [--steps 40]

Each recipe trains the network of the original script on generated images, from scratch, and ends with a checkpoint. Weights and
optimizer state are compared. Two ranks share a GPU if there is one, and exchange gradients with gloo. Exits with 1 if something
is different.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import arguments

from ddp_cifar.run.checkpoint_file import digest, load_checkpoint

RECIPES = {
    "deterministic": ("repeated", "resumed"),
    "reproducible": ("repeated", "resumed", "on two ranks"),
}
"""What is compared for train.deterministic=true and for train.reproducible=true."""


def main() -> int:
    parser = arguments("whether runs are bitwise repeatable", rounds=1)
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--steps", type=int, default=40, help="steps per run (40)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(all)")
    options = parser.parse_args()
    found: dict[str, dict[str, bool]] = {}
    for recipe in options.recipes:
        cases = RECIPES[recipe]
        settings = [
            *("configs/demo.yaml", f"train.{recipe}=true", f"device={options.device}", "train.epochs=1"),
            *(f"train.global_batch_size={options.batch}", f"train.micro_batch_size={options.batch // 4}"),
            *(f"data.shapes.train_images={options.batch * options.steps}", "data.shapes.test_images=100"),
            *("checkpoint.every_minutes=null", "tracking.pictures_every=null"),
        ]
        with tempfile.TemporaryDirectory() as folder:
            whole = train(Path(folder, "whole"), settings, options.steps)
            found[recipe] = {}
            for case in cases:
                run_dir = Path(folder, case.replace(" ", "_"))
                if case == "resumed":
                    train(run_dir, settings, options.steps // 2)
                other = train(run_dir, settings, options.steps, ranks=2 if case == "on two ranks" else 1)
                found[recipe][case] = other == whole
                print(f"train.{recipe}=true, {case}: {'equal' if other == whole else 'different'}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(not all(all(equal.values()) for equal in found.values()))


def train(run_dir: Path, settings: list[str], steps: int, ranks: int = 1) -> str:
    """Train up to `steps` steps, and return a digest of the weights and the optimizer's state."""
    launch = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={ranks}"]
    command = [
        *launch,
        "-m",
        "ddp_cifar.train",
        *settings,
        "backend=gloo",
        f"train.max_steps={steps}",
        f"run_dir={run_dir}",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    state = load_checkpoint(run_dir / "checkpoints" / "latest.pt")
    return digest({name: state[name] for name in ("model", "optimizer")})


if __name__ == "__main__":
    sys.exit(main())
