"""Settings compared by `quality.py`, most promising first; each extends `COMMON`."""

from __future__ import annotations

from functools import partial
from typing import Any

Settings = dict[str, Any]

# Settings of all runs: the training budget of the original runs, without early stopping on the scored rows.
COMMON: Settings = {
    "training.batch_size": 128,
    "training.topo_samples": 128,
    "training.num_epochs": 200,
    "training.early_stopping_patience": 1_000_000,
    "training.val_every_n_epochs": 50,
}

_RECIPE: Settings = {
    "model.codebook_init": "product",
    "model.commitment_cost": 0.01,
    "model.dropout": 0.0,
    "training.informativeness_weight": 0.001,
    "training.input_noise": 0.1,
    "training.mixup_scale": 0.4,
    "training.learning_rate": 1e-3,
    "training.scheduler": "cosine",
    "training.warmup_epochs": 10,
}


def _with(settings: Settings, **changes: Any) -> Settings:
    """Settings with changes; `model__dropout` means `model.dropout`."""
    return settings | {name.replace("__", ".", 1): value for name, value in changes.items()}


_changed = partial(_with, _RECIPE)


def _regularised(noise: float, mixing: float, dropout: float, commitment: float = 0.01, **more: Any) -> Settings:
    return _changed(
        training__input_noise=noise,
        training__mixup_scale=mixing,
        model__dropout=dropout,
        model__commitment_cost=commitment,
        **more,
    )


# The recipe with more commitment, a higher learning rate and frequent dead-code resets, each of which helped alone.
_COMBINED: Settings = _changed(
    model__commitment_cost=0.1,
    model__decay=0.97,
    training__learning_rate=2e-3,
    training__dead_code_threshold=0.2,
    training__dead_code_reset_interval=5,
    training__mixup_decay=True,
    training__decoder_refit=0.03,
)


_combined = partial(_with, _COMBINED)

# Since product initialisation has linear networks and every feature is an input.
_READ_ALL: Settings = _combined(
    model__unassigned_features="nearest", training__optimizer="adamw", training__weight_decay=1.0
)


_ADAM: Settings = {"training__optimizer": "adam", "training__weight_decay": 0.0}


_read_all = partial(_with, _READ_ALL)

# The candidates of `--choose`, most promising first.
COMBINATIONS: dict[str, Settings] = {
    "read_all": _READ_ALL,
    "read_all_lr_1e-3": _read_all(training__learning_rate=1e-3),
    "read_all_lr_5e-4": _read_all(training__learning_rate=5e-4),
    "read_all_refit_0": _read_all(training__decoder_refit=0.0),
    "read_all_refit_0.3": _read_all(training__decoder_refit=0.3),
    "read_all_commitment_0.25": _read_all(model__commitment_cost=0.25),
    "read_all_commitment_0.5": _read_all(model__commitment_cost=0.5),
    "read_all_decoder_dropout_0.1": _read_all(model__decoder_dropout=0.1),
    "read_all_no_mixing": _read_all(training__mixup_scale=0.0),
    "read_all_no_noise": _read_all(training__input_noise=0.0),
    "read_all_n0.2": _read_all(training__input_noise=0.2),
    "read_all_adam": _read_all(**_ADAM),
    "read_all_adam_refit_0": _read_all(**_ADAM, training__decoder_refit=0.0),
    # The shipped settings: codes of few rows are replaced, and settle in the last quarter.
    "settled": _read_all(
        **_ADAM,
        training__decoder_refit=0.0,
        training__dead_code_threshold="auto",
        training__dead_code_reset_until=0.75,
        model__commitment_cost="auto",
    ),
    "read_all_adam_n0.2": _read_all(**_ADAM, training__input_noise=0.2),
    "read_all_adam_lr_1e-3": _read_all(**_ADAM, training__learning_rate=1e-3),
    "read_all_adam_n0.2_lr_1e-3": _read_all(**_ADAM, training__input_noise=0.2, training__learning_rate=1e-3),
    "read_all_adamw_0.1": _read_all(training__weight_decay=0.1),
    "read_all_adamw_3": _read_all(training__weight_decay=3.0),
    "read_all_batch_64": _read_all(training__batch_size=64, training__topo_samples=64),
    "combined": _COMBINED,
    "combined_mixing_stays": _combined(training__mixup_decay=False),
    "combined_n0.2": _combined(training__input_noise=0.2),
    "combined_n0.3_m0.2": _combined(training__input_noise=0.3, training__mixup_scale=0.2),
    "combined_c0.05": _combined(model__commitment_cost=0.05),
    "combined_info_0.03": _combined(training__informativeness_weight=0.03),
    "combined_topo_0.1": _combined(training__topo_weight=0.1),
    "combined_lr_1e-3": _combined(training__learning_rate=1e-3),
    "combined_lr_3e-3": _combined(training__learning_rate=3e-3),
    "combined_batch_64": _combined(training__batch_size=64, training__topo_samples=64),
    "combined_adamw_1": _combined(training__optimizer="adamw", training__weight_decay=1.0),
    "combined_resets_10_steps": _combined(training__dead_code_reset_steps=10),
    "combined_decay_0.99": _combined(model__decay=0.99),
    "combined_no_mixing": _combined(training__mixup_scale=0.0),
    "combined_no_noise_no_mixing": _combined(training__input_noise=0.0, training__mixup_scale=0.0),
    "combined_resets_25": _combined(training__dead_code_reset_interval=25),
}

VARIANTS: dict[str, Settings] = {
    "baseline": {},
    **COMBINATIONS,
    "recipe": _RECIPE,
    # Regularisation: noise / mixing / dropout / commitment.
    "n0.3_m0_d0": _regularised(0.3, 0.0, 0.0),
    "n0_m0.4_d0": _regularised(0.0, 0.4, 0.0),
    "n0_m0.4_d0.1": _regularised(0.0, 0.4, 0.1),
    "n0_m0.4_d0.1_c0.05": _regularised(0.0, 0.4, 0.1, 0.05),
    "n0.1_m0.4_d0.05": _regularised(0.1, 0.4, 0.05),
    "n0_m0.8_d0": _regularised(0.0, 0.8, 0.0),
    "n0.1_m0.8_d0": _regularised(0.1, 0.8, 0.0),
    "n0.1_m0.4_d0_c0.05": _regularised(0.1, 0.4, 0.0, 0.05),
    "n0.1_m0.4_d0_c0.1": _regularised(0.1, 0.4, 0.0, 0.1),
    "n0.2_m0.4_d0": _regularised(0.2, 0.4, 0.0),
    "n0.1_m0.6_d0.05_c0.05": _regularised(0.1, 0.6, 0.05, 0.05),
    "n0.1_m0.4_dec0.1": _regularised(0.1, 0.4, 0.0, model__decoder_dropout=0.1),
    "n0.1_m0.4_dec0.3": _regularised(0.1, 0.4, 0.0, model__decoder_dropout=0.3),
    "n0_m0_d0": _regularised(0.0, 0.0, 0.0),
    "n0_m0_d0.1": _regularised(0.0, 0.0, 0.1),
    "n0.1_m0_d0": _regularised(0.1, 0.0, 0.0),
    # The recipe with one change.
    "kmeans_start": _changed(model__codebook_init="kmeans"),
    "rate_constant": _changed(training__scheduler="none"),
    "info_0.1": _changed(training__informativeness_weight=0.1),
    "info_0.03": _changed(training__informativeness_weight=0.03),
    "info_0.1_c0.1": _changed(training__informativeness_weight=0.1, model__commitment_cost=0.1),
    "commitment_0.25": _changed(model__commitment_cost=0.25),
    # The recipe with other values of one setting.
    "lr_2e-3": _changed(training__learning_rate=2e-3),
    "lr_4e-3": _changed(training__learning_rate=4e-3),
    "lr_5e-4": _changed(training__learning_rate=5e-4),
    "adamw_0.1": _changed(training__optimizer="adamw", training__weight_decay=0.1),
    "adamw_1": _changed(training__optimizer="adamw", training__weight_decay=1.0),
    "adamw_5": _changed(training__optimizer="adamw", training__weight_decay=5.0),
    "decay_0.97": _changed(model__decay=0.97),
    "decay_0.9": _changed(model__decay=0.9),
    "topo_0.1": _changed(training__topo_weight=0.1),
    "topo_0.03": _changed(training__topo_weight=0.03),
    "info_0.01": _changed(training__informativeness_weight=0.01),
    "info_0": _changed(training__informativeness_weight=0.0),
    "commitment_0": _changed(model__commitment_cost=0.0),
    "batch_64": _changed(training__batch_size=64, training__topo_samples=64),
    "rotation_trick": _changed(model__rotation_trick=True),
    "resets_off": _changed(training__dead_code_reset_interval=0),
    "resets_sample_10_steps": _changed(
        training__dead_code_reset_interval=0, training__dead_code_reset_steps=10, training__dead_code_strategy="sample"
    ),
    "resets_often": _changed(training__dead_code_threshold=0.2, training__dead_code_reset_interval=5),
    "warmup_0": _changed(training__warmup_epochs=0),
    "warmup_30": _changed(training__warmup_epochs=30),
    "topo_0": _changed(training__topo_weight=0.0),
    # The baseline with one change.
    "baseline_commitment_0.01": {"model.commitment_cost": 0.01},
    "baseline_product_start": {"model.codebook_init": "product"},
    "baseline_info_0.001": {"training.informativeness_weight": 0.001},
    "baseline_noise_0.2": {"training.input_noise": 0.2},
    "baseline_mixing_0.4": {"training.mixup_scale": 0.4},
    "baseline_dropout_0": {"model.dropout": 0.0},
    "baseline_cosine": {"training.scheduler": "cosine", "training.warmup_epochs": 10},
    "baseline_uniform_start": {"model.codebook_init": "uniform"},
    "baseline_rotation_trick": {"model.rotation_trick": True},
}
