"""Runs in Weights & Biases, online or offline. Needs the package wandb."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_cifar.log import log
from ddp_cifar.tracking.records import Record
from ddp_cifar.tracking.sender import best_name, run_id


class WandB:
    """A run in W&B. The variables WANDB_* apply, such as WANDB_MODE=offline; `project` and `entity` replace theirs.

    Offline, each start writes a new folder with all steps of the run, and removes the older folders: `wandb sync` replaces a run
    by the last folder that it uploads.

    `registered_model`: with tracking.artifacts, also link the checkpoint to this name in the registry.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run_dir: str,
        project: str | None = None,
        entity: str | None = None,
        registered_model: str | None = None,
    ) -> None:
        import wandb  # takes a second

        self.registered_model = registered_model
        folder, own_id = Path(run_dir), run_id(run_dir)
        older = list(folder.glob(f"wandb/offline-run-*-{own_id}"))
        self.run = wandb.init(
            project=project,
            entity=entity,
            id=own_id,
            resume="allow",
            name=folder.name,
            group=config["tracking"]["group"],
            dir=run_dir,
            reinit="finish_previous",  # after a failure
            settings=wandb.Settings(silent=True, console="off"),
        )
        if self.run.url:
            log.info(f"the run in W&B: {self.run.url}")
        self.run.config.update(dict(config), allow_val_change=True)
        self.last_step = self.run.starting_step - 1
        if self.run.settings._offline:
            for path in older:
                shutil.rmtree(path, ignore_errors=True)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.run.config.update({"about": dict(tags)}, allow_val_change=True)
        self.run.tags = tuple({*(self.run.tags or ()), *([tags["recipe"]] if tags.get("recipe") else [])})

    def log_steps(self, records: Sequence[Record]) -> None:
        import wandb

        for record in records:
            pictures = {tag: wandb.Image(str(path)) for tag, path in record.pictures.items()}
            self.run.log({**record.scalars, **pictures, "_timestamp": record.time}, step=record.step, commit=True)

    def end(self, outcome: str, best: Mapping[str, Record], checkpoint: Path | None) -> None:
        import wandb

        for tag, record in best.items():
            self.run.summary.update({best_name(tag): record.scalars[tag], f"{best_name(tag)}_step": record.step})
        self.run.summary.update({"outcome": outcome})
        if checkpoint:
            artifact = wandb.Artifact(f"{self.run.id}-checkpoint", type="model")
            artifact.add_file(str(checkpoint))
            logged = self.run.log_artifact(artifact, aliases=["best"])
            if self.registered_model:
                self.run.link_artifact(logged, f"wandb-registry-model/{self.registered_model}")
        self.run.finish(exit_code=0 if outcome.partition(":")[0] in ("finished", "stopped") else 1)
