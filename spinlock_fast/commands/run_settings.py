"""The settings of a training run from the command line: a YAML file or a run to resume, and overrides."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.checkpoints.run_directory import can_resume, config_to_resume, run_to_resume
from spinlock_fast.config.loading import load_config, load_written_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import DataError


def run_settings(
    config: str | None, overrides: Sequence[str], output: str | None, resume: str | None, device: str | None
) -> tuple[RunConfig, Path | None]:
    """The settings, and the directory of the run to resume.

    Args:
        config: YAML file; may be None with `resume`, whose settings are then used.
        overrides: texts such as "training.num_epochs=5".
        output: checkpoint directory; by default that of the resumed run, else `output_dir`.
        resume: directory of an interrupted run; "auto" for the output directory, if there is a run to resume in it.
        device: replaces the `device` of the file.

    Raises:
        ConfigError: a setting is wrong.
        DataError: there is no run to resume.
    """
    if resume == "auto":
        settings, _ = run_settings(config, overrides, output, None, device)
        if settings.output_dir is None or not can_resume(Path(settings.output_dir)):
            return settings, None
        resume = output = str(settings.output_dir)
    resumed = run_to_resume(Path(resume)) if resume else None
    changes = list(overrides)
    if device:
        changes.append(f"device={json.dumps(device)}")
    if directory := output or resumed:
        changes += [f"output_dir={json.dumps(str(directory))}", "training.checkpoint_dir=null"]
    if resumed and not config:
        written = config_to_resume(resumed)
        if not os.path.exists(written):
            raise DataError(f"--resume {resumed}: holds no run; name the output directory of one")
        return load_written_config(written, changes), resumed
    assert config is not None
    return load_config(config, changes), resumed
