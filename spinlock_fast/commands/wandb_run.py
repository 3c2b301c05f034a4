"""Scalars of a run to Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spinlock_fast.checkpoints.run_directory import PARTIAL, WANDB
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.errors import ConfigError
from spinlock_fast.messages import one_line
from spinlock_fast.output.atomic_files import write_text

_PROJECT = "spinlock-fast"
_IDENTIFIER = "run_id.txt"


class WandbScalars:
    """A run of Weights & Biases, whose local files are in the directory `wandb` of the checkpoint.

    Args:
        directory: checkpoint directory; local files are in `.partial` until the run is complete.
        config: project and mode; by default those of the environment variables WANDB_PROJECT and WANDB_MODE.
        first_epoch: if above 0, the run with the identifier that is stored in the directory is continued.
        settings: of the run, as its configuration.

    Raises:
        ConfigError: wandb refuses the run, for instance without an account.
        OutputError: the identifier cannot be written.
    """

    def __init__(self, directory: Path, config: LoggingConfig, first_epoch: int, settings: Mapping[str, Any]) -> None:
        import wandb

        partial = directory / PARTIAL
        (partial / WANDB).mkdir(parents=True, exist_ok=True)
        identifier = self._stored_identifier(directory) if first_epoch else None
        try:
            self._run = wandb.init(
                project=config.wandb_project or os.environ.get("WANDB_PROJECT") or _PROJECT,
                name=os.environ.get("WANDB_NAME") or directory.name,
                dir=str(partial),
                mode=config.wandb_mode,
                config=dict(settings),
                id=identifier,
                resume="allow" if identifier else None,
                settings=wandb.Settings(console="off"),
            )
        except (wandb.errors.Error, OSError, ValueError) as error:
            reason = one_line(error).rstrip(".")
            raise ConfigError(
                f"logging.wandb: {reason}; logging.wandb_mode=offline needs no account and no network"
            ) from None
        write_text(partial / WANDB / _IDENTIFIER, f"{self._run.id}\n")

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Logs the scalars; steps that the run has already are left as they are."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run, which uploads or writes what is left."""
        self._run.finish()

    @staticmethod
    def _stored_identifier(directory: Path) -> str | None:
        for parent in (directory / PARTIAL, directory):
            with suppress(OSError, ValueError):
                return (parent / WANDB / _IDENTIFIER).read_text(encoding="utf-8").strip() or None
        return None
