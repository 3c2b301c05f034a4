"""Settings of a run: one frozen model per section of the YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.config.families import (
    DEFAULT_DATASETS,
    ENCODER_PARAMS,
    EncoderParams,
    FamilyConfig,
    IdentityEncoderParams,
    MLPEncoderParams,
    StatisticsEncoderParams,
    TemporalCNNEncoderParams,
    default_families,
    parse_families,
)
from spinlock_fast.config.section import (
    INT32_MAX,
    FloatOrAuto,
    IntOrAuto,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)

__all__ = [
    "DEFAULT_DATASETS",
    "ENCODER_PARAMS",
    "INT32_MAX",
    "EncoderParams",
    "FamilyConfig",
    "IdentityEncoderParams",
    "MLPEncoderParams",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Section",
    "StatisticsEncoderParams",
    "TemporalCNNEncoderParams",
]

ByteSize = Annotated[int, BeforeValidator(parse_bytes)]


class FeatureCleaningConfig(Section):
    enabled: bool = Field(default=True, description="false: every column is kept, nothing is clipped")
    nan_fill: Literal["median", "zero"] = Field(
        default="median",
        description="replacement of missing raw values: median of the training rows, or 0",
    )
    variance_threshold: NonNegativeFloat = Field(
        default=1e-8, description="columns with a smaller standard deviation are dropped"
    )
    deduplicate_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.99, description="|correlation| above which the less informative of two columns is dropped"
    )
    outlier_method: Literal["mad", "percentile", "iqr", "none"] = Field(
        default="mad", description="method for the clip bounds of a column"
    )
    mad_threshold: PositiveFloat = Field(
        default=5.0, description="clip bounds of outlier_method mad: median +/- this many sigma; none where MAD = 0"
    )
    mad_scale: PositiveFloat = Field(
        default=1.4826, description="sigma = mad_scale * MAD; 1.0 as in the original project"
    )
    percentile_range: tuple[float, float] = Field(
        default=(0.5, 99.5), strict=False, description="clip bounds of outlier_method percentile"
    )
    iqr_multiplier: PositiveFloat = Field(
        default=1.5, description="clip bounds of outlier_method iqr: quartiles -/+ this many IQR"
    )

    @field_validator("percentile_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 100.0:
            raise ValueError("expected two increasing percentages between 0 and 100")
        return value


class LevelConfig(Section):
    """Size of a codebook: `num_tokens` codes of `latent_dim` dimensions."""

    num_tokens: PositiveInt = Field(description="number of codes")
    latent_dim: PositiveInt = Field(description="dimension of a code")


Levels = list[LevelConfig] | dict[str, list[LevelConfig]]


def parse_ratios(text: str) -> tuple[float, ...]:
    """Latent dimensions per feature of each level from a text such as "0.5:1:1.5"; raises ValueError."""
    try:
        ratios = tuple(float(part) for part in text.split(":"))
    except ValueError:
        ratios = ()
    if not ratios or any(not 0.0 < ratio < 1000.0 for ratio in ratios):
        raise ValueError('expected positive numbers separated by colons, such as "0.5:1:1.5"')
    return ratios


class ModelConfig(Section):
    group_embedding_dim: PositiveInt = Field(default=256, description="width of a category's embedding")
    group_hidden_dim: PositiveInt = Field(default=512, description="hidden width of a category's MLP")
    levels: Levels = Field(
        default=[],
        description="codebook sizes: [] derives them from the number of features; a list for all or for each category",
    )
    compression_ratios: str = Field(
        default="0.5:1:1.5", description="latent dimensions per feature of each level, coarse to fine"
    )
    uniform_codebook_init: bool = Field(default=False, description="all levels have as many codes as level 0")
    unassigned_features: Literal["decoded", "nearest"] = Field(
        default="decoded",
        description="features in no category are reconstructed from all codes; nearest: they are also inputs of the "
        "most correlated category",
    )
    codebook_init: Literal["kmeans", "uniform", "product"] = Field(
        default="kmeans",
        description="initial codes: k-means++ on the first rows, or uniform random; product: k-means after dividing "
        "the principal components of a category among its levels (Ge et al. 2013)",
    )
    commitment_cost: FloatOrAuto = Field(
        default=0.25,
        description="weight of the commitment loss of the quantizer (van den Oord et al. 2017); auto: 0.05 / bits per "
        "feature, within 0.1 and 0.25",
    )
    use_ema: bool = Field(
        default=True, description="codes are updated by exponential moving average; false: by gradient"
    )
    decay: Probability = Field(default=0.99, description="decay of the exponential moving average")
    dropout: Probability = Field(default=0.1, description="dropout of encoder and decoder layers")
    decoder_dropout: Probability | None = Field(
        default=None, description="dropout of the decoder; null: the value of dropout"
    )
    rotation_trick: bool = Field(
        default=False,
        description="gradient of the quantizer by the rotation trick (Fifty et al. 2024, arXiv 2410.06424)",
    )

    @field_validator("compression_ratios")
    @classmethod
    def _ratios(cls, value: str) -> str:
        parse_ratios(value)
        return value


# Keys of `training` that earlier versions wrote -> current keys.
_RENAMED_TRAINING_KEYS = {"mixing": "mixup_scale", "mixing_decays": "mixup_decay"}


def with_current_names(training: Mapping[str, Any]) -> dict[str, Any]:
    """The section `training` with renamed keys under their current names; of two names for one key the later wins."""
    return {_RENAMED_TRAINING_KEYS.get(key, key): value for key, value in training.items()}


class TrainingConfig(Section):
    batch_size: PositiveInt = Field(default=512, description="rows per step, at most the number of training rows")
    learning_rate: PositiveFloat = Field(default=1e-3, description="learning rate of the optimizer")
    num_epochs: PositiveInt = Field(default=200, description="passes over the training rows")
    mixup_scale: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0,
        description="mixup with extrapolation of training rows, inputs and targets: x + u (x' - x) with u ~ U(-m, m), "
        "where m is this scale; old name: mixing",
    )
    input_noise: NonNegativeFloat = Field(
        default=0.0, description="standard deviation of noise added to training inputs, not to targets"
    )
    mixup_decay: bool = Field(
        default=False, description="mixup_scale follows the learning rate of the schedule; old name: mixing_decays"
    )
    decoder_refit: NonNegativeFloat = Field(
        default=0.0,
        description="ridge regression of the last decoder layer on the training rows after the last epoch, towards its "
        "trained weights; penalty relative to the variance of its inputs, 0: none",
    )
    joint_search_epochs: IntOrAuto = Field(
        default=0,
        description="epochs after the last one in which a decoder of tokens is fitted to the training rows, with joint "
        "tokens searched anew in each; 0: tokens are decoded by the trained decoder; auto: 3,000 steps, within 5 and "
        "60 epochs",
    )
    optimizer: Literal["adam", "adamw"] = Field(default="adam", description="optimizer")
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="decoupled weight decay of adamw, L2 penalty of adam"
    )
    scheduler: Literal["none", "cosine"] | None = Field(
        default="none", description="learning rate schedule: constant, or cosine decay to zero"
    )
    warmup_epochs: NonNegativeInt = Field(default=0, description="epochs of linear warm-up")
    category_assignment: str = Field(
        default="auto", description="auto, or a JSON file {category: [feature names]}; alias category_mapping_file"
    )
    num_categories_auto: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="number of categories (of each isolated family, and of the others); null: by silhouette",
    )
    orthogonality_target: PositiveFloat = Field(
        default=0.15, description="largest category correlation without a warning"
    )
    min_features_per_category: PositiveInt = Field(
        default=3, description="smaller categories are merged into their nearest"
    )
    max_clusters: Annotated[int, Field(ge=2)] = Field(default=25, description="largest number of categories tried")
    isolated_families: list[str] = Field(default=[], description="families whose features are clustered separately")
    reconstruction_weight: NonNegativeFloat = Field(default=1.0, description="weight of the reconstruction error")
    vq_weight: NonNegativeFloat = Field(default=1.0, description="weight of the commitment loss")
    orthogonality_weight: NonNegativeFloat = Field(default=0.1, description="weight of code orthogonality")
    informativeness_weight: NonNegativeFloat = Field(
        default=0.1, description="weight of the loss of the partial decoders"
    )
    topo_weight: NonNegativeFloat = Field(default=0.3, description="weight of the distance preservation loss")
    topo_samples: Annotated[int, Field(ge=2)] = Field(
        default=512, description="rows of a batch whose pairs enter the distance preservation loss"
    )
    early_stopping_patience: PositiveInt = Field(
        default=30, description="validations without improvement after which the run stops"
    )
    early_stopping_min_delta: NonNegativeFloat = Field(
        default=0.0, description="smallest decrease of the validation loss that counts as improvement"
    )
    dead_code_reset_interval: NonNegativeInt = Field(
        default=25, description="epochs between resets of dead codes; 0: never"
    )
    dead_code_reset_steps: NonNegativeInt = Field(
        default=0, description="steps between resets of dead codes, in addition to those by epoch; 0: never"
    )
    dead_code_threshold: FloatOrAuto = Field(
        default=0.05,
        description="codes with less than this share of the mean usage of their codebook are dead; auto: 5 training "
        "rows of the largest codebook, within 0.2 and 0.5",
    )
    dead_code_strategy: Literal["perturb", "sample"] = Field(
        default="perturb", description="replacement of dead codes: perturbed copies of used codes, or random latents"
    )
    dead_code_reset_until: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=1.0, description="share of the epochs during which dead codes are reset; afterwards the codes settle"
    )
    max_reset_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.25, description="largest share of a codebook replaced by one reset"
    )
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1, description="share of the rows held out for validation"
    )
    test_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="share of the rows held out from training and validation"
    )
    val_every_n_epochs: PositiveInt = Field(default=5, description="epochs between validations")
    save_every: PositiveInt = Field(default=25, description="epochs between resumable checkpoints")
    save_minutes: PositiveFloat = Field(default=5.0, description="maximum minutes between resumable checkpoints")
    on_divergence: Literal["stop", "rewind"] = Field(
        default="stop",
        description="on a non-finite loss: stop, or rewind to the last finite state with half the learning rate, "
        "at most 5 times",
    )
    data_on_device: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="keep rows on the device (always) or stream them from main memory (never); auto: on the device "
        "where they take at most half of its free memory",
    )
    row_order: Literal["auto", "shuffled", "windows"] = Field(
        default="auto",
        description="order of the training rows of an epoch: a permutation of all rows (shuffled), or of rows within "
        "256 MiB of the matrix at a time, which reads a disk in sequence (windows); auto: windows from 8 GiB on",
    )
    cuda_graphs: bool = Field(
        default=True, description="capture training steps as CUDA graphs; no effect on other devices"
    )
    use_torch_compile: bool = Field(
        default=False,
        description="accepted, without effect: on CUDA devices steps are captured as CUDA graphs, see cuda_graphs",
    )
    normalization_method: Literal["standard", "mad"] = Field(
        default="standard", description="normalisation of features: mean and standard deviation, or median and MAD"
    )
    init_from: str | None = Field(
        default=None,
        description="checkpoint directory to start from: its families, cleaning, normalisation, categories, model and "
        "codes are kept, and its weights are trained further; null: train from scratch",
    )
    freeze: Literal["none", "encoders", "codes", "tokens"] = Field(
        default="none",
        description="parts of init_from that are not trained: the category encoders, the codes, or both (tokens), so "
        "that every row keeps its tokens",
    )

    @property
    def mapping_file(self) -> str | None:
        """The JSON file of categories; None where they are discovered."""
        return None if self.category_assignment == "auto" else self.category_assignment

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, data: Any) -> Any:
        return with_current_names(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _fractions(self) -> TrainingConfig:
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError("val_fraction + test_fraction must leave rows to train on")
        if not any((self.reconstruction_weight, self.vq_weight, self.informativeness_weight, self.topo_weight)):
            raise ValueError("at least one of reconstruction_weight, vq_weight, informativeness_weight, topo_weight")
        if self.freeze in ("encoders", "tokens") and not (self.reconstruction_weight or self.informativeness_weight):
            raise ValueError(f"freeze: {self.freeze} leaves the decoders to train: reconstruction_weight must not be 0")
        return self


class DataConfig(Section):
    allow_external: bool = Field(default=True, description="false: refuse values outside the directory of a data file")
    manifest_dir: str | None = Field(default=None, description="directory for the manifest of the shards; null: none")
    remote_cache_dir: str | None = Field(default=None, description="copies of remote files; null: in ~/.cache")
    remote_cache_size: ByteSize | None = Field(default=None, description="size limit of that directory; null: 20GB")
    feature_matrix: Literal["auto", "memory", "disk"] = Field(
        default="auto",
        description="where the encoded features are kept: memory, or a file in the output directory while the command "
        "runs (disk); auto: on disk beyond half of memory_budget, or with several ranks, which share the file",
    )


class LoggingConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="lowest severity of shown messages"
    )
    tensorboard: bool | None = Field(
        default=None, description="write TensorBoard scalars; null: where tensorboard is installed"
    )
    csv: bool = Field(default=False, description="write the same scalars to scalars.csv, a row for each epoch")
    wandb: bool = Field(default=False, description="log the same scalars to Weights & Biases (extra wandb)")
    wandb_project: str | None = Field(
        default=None, description="project of Weights & Biases; null: WANDB_PROJECT, else spinlock-fast"
    )
    wandb_mode: Literal["online", "offline"] | None = Field(
        default=None, description="offline: local files, for `wandb sync`; null: WANDB_MODE, else online"
    )


class RunConfig(Section):
    """All settings of a run."""

    dataset_path: str | list[str] | None = Field(
        default=None, description="HDF5 file, glob, @list.txt, s3:// or other address, or a list of those"
    )
    data: DataConfig = Field(default_factory=DataConfig, description="see its section")
    memory_budget: ByteSize = Field(default=1_250_000_000, description="maximum bytes of raw features in memory")
    output_dir: str | None = Field(
        default=None, description="checkpoint directory (checkpoints/<config name>); alias training.checkpoint_dir"
    )
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=42, description="seed of all random numbers")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    families: Annotated[dict[str, FamilyConfig], BeforeValidator(parse_families)] = Field(
        default_factory=default_families,
        description="feature families by name; auto: those in the group features of the file, without architecture",
    )
    feature_cleaning: FeatureCleaningConfig = Field(
        default_factory=FeatureCleaningConfig, description="see its section"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="see its section")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="see its section")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="see its section")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("expected auto, cpu, cuda or cuda:N")
        return value

    @field_validator("families")
    @classmethod
    def _datasets_known(cls, families: dict[str, FamilyConfig]) -> dict[str, FamilyConfig]:
        for name in families:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(f"family name {name!r} may contain letters, digits, '_', '.', '-'")
        return families

    @field_serializer("families", mode="wrap")
    def _auto(self, families: dict[str, FamilyConfig], serialize: SerializerFunctionWrapHandler) -> Any:
        return serialize(families) if families else "auto"

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        unknown = set(self.training.isolated_families) - set(self.families)
        if unknown and self.families:
            raise ValueError(
                f"training.isolated_families names {sorted(unknown)[0]!r}, which is none of {', '.join(self.families)}"
            )
        return self

    def datasets(self) -> dict[str, str]:
        """Path in the HDF5 file of every family; see `resolve_families` for names without a default."""
        return {
            name: family.dataset or DEFAULT_DATASETS.get(name, f"features/{name}/features")
            for name, family in self.families.items()
        }
