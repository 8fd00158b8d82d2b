"""Send the metrics and pictures of a run to its trackers: `python -m ddp_cifar.sync RUN_DIR [key=value ...]`.

It sends what the trackers in `tracking.name` lack, for example if there was no connection while the run trained. For a run
without a tracker, add one: `tracking.name=mlflow`. The config is that in RUN_DIR, with the arguments.
"""

import contextlib
from collections.abc import Sequence

from ddp_cifar.command import Arguments, run_command
from ddp_cifar.config import load_config
from ddp_cifar.errors import RunError, UserError
from ddp_cifar.log import log
from ddp_cifar.run.run_dir import RunDir
from ddp_cifar.tracking import build_senders


def main(argv: Sequence[str]) -> int:
    """Send everything; return 0. Raises `RunError` if a tracker fails."""
    parser = Arguments("ddp_cifar.sync", __doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("arguments", metavar="key=value", nargs="*", help="such as tracking.name=mlflow")
    options = parser.parse_intermixed_args(argv)
    run_dir = RunDir(options.run_dir)
    try:
        config = load_config([*options.arguments, f"run_dir={run_dir.path}"], base=run_dir.read_config())
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run_dir.path} has no readable config.yaml ({error}): expected the folder of a run"
        ) from error
    with contextlib.suppress(OSError):
        if run_dir.is_locked():
            raise UserError(f"{run_dir.path} is in use by a run, which sends its metrics itself")
    # rows of the last step may follow when the run resumes
    senders = build_senders(config, is_step_whole=lambda: False)
    if not senders:
        raise UserError(f"{run_dir.path} has no tracker: add one, such as tracking.name=mlflow or tracking.name=wandb")
    for sender in senders:
        sender.end(run_dir.read_status())
        try:
            sender.finish()
        except Exception as error:  # a service may raise anything
            raise RunError(sender.describe(error)) from error
        log.info(f"{sender.name} has all metrics of {run_dir.path}")
    return 0


if __name__ == "__main__":
    run_command(main)
