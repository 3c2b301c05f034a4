"""What training does in an epoch, by the settings."""

from __future__ import annotations

from spinlock_fast.config.schema import TrainingConfig


def resets_dead_codes(training: TrainingConfig, epoch: int) -> bool:
    """Whether dead codes are reset in and after an epoch, counted from 1, if their interval says so."""
    return epoch <= training.dead_code_reset_until * training.num_epochs


def settings_by_length(training: TrainingConfig) -> str:
    """Which setting makes epochs depend on `num_epochs`; "" if none."""
    if training.scheduler == "cosine":
        return "training.scheduler is cosine"
    return "training.dead_code_reset_until is below 1" if training.dead_code_reset_until < 1.0 else ""
