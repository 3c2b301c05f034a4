"""A trained predictor of tokens, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.checkpoints.directory import load_torch, save_torch
from spinlock_fast.checkpoints.host_copies import to_cpu
from spinlock_fast.data.payload_checks import checked_strings, payload_errors
from spinlock_fast.descriptors.geometry import AXIS_NAMES
from spinlock_fast.errors import DataError
from spinlock_fast.messages import shown
from spinlock_fast.models.input_check import KnownRows
from spinlock_fast.prediction.inputs import Batch, Inputs, Standardizer, earlier_levels
from spinlock_fast.prediction.network import InputNetwork, InputShape, TokenNetwork
from spinlock_fast.prediction.settings import PredictorConfig
from spinlock_fast.tokenizer import Tokenizer

FILE = "predictor.pt"
_FORMAT = 1


@dataclass(frozen=True)
class Neighbours:
    """Training rows whose tokens a nearest-neighbour prediction takes: signatures [R, S] and tokens [R, G]."""

    signatures: Tensor
    tokens: Tensor


@dataclass
class Predictor:
    """A network of tokens with its tokenizer, and the references that it is compared with.

    Args:
        config: its settings.
        tokenizer: of the tokens.
        shape: of the inputs.
        sha256: hash of the tokenizer's model file.
        network: theta and u0 -> logits.
        regression: theta and u0 -> features directly, of the same size, for comparison.
        standardizer: of the inputs.
        counts: [G] of [K_g] how often each code occurs in the training rows.
        neighbours: a sample of the training rows.
        known_rows: which rows it was trained on.
        names: [P] of the parameters; None if the training data had none.
    """

    config: PredictorConfig
    tokenizer: Tokenizer
    shape: InputShape
    sha256: str
    network: TokenNetwork
    regression: InputNetwork
    standardizer: Standardizer
    counts: list[Tensor]
    neighbours: Neighbours
    known_rows: KnownRows
    names: list[str] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> Predictor:
        """Moves all networks; returns the predictor."""
        self.network.to(device)
        self.regression.to(device)
        self.tokenizer.to(device)
        return self

    def inputs(self, paths: str | list[str]) -> Inputs:
        """The inputs of a file; raises DataError where shapes or names of parameters are not those of training."""
        inputs = Inputs(paths, self.config)
        found, trained = inputs.shape, self.shape
        if not found.periodic or not trained.periodic:  # not known of one of them
            found, trained = found._replace(periodic=()), trained._replace(periodic=())
        if found != trained:
            raise DataError(f"{paths}: {_in_words(found)}, but the predictor was trained on {_in_words(trained)}")
        if None not in (inputs.names, self.names) and inputs.names != self.names:
            raise DataError(
                f"{paths}: {self.config.parameters}: the columns differ from those of training, in name or order: "
                f"{shown(inputs.names)} instead of {shown(self.names)}"
            )
        return inputs

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """The most probable tokens [B, G], level by level."""
        tokens: Tensor = self.network(*self.standardizer(batch, self.device))[1]
        return tokens.cpu()

    def save(self, path: Path) -> None:
        """Writes one file; raises OutputError."""
        payload = {
            "format": _FORMAT,
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.tokenizer.payload(),
            "shape": list(self.shape[:3]),
            "periodic": list(self.shape.periodic),
            "sha256": self.sha256,
            "network": self.network.state_dict(),
            "regression": self.regression.state_dict(),
            "standardizer": vars(self.standardizer),
            "counts": self.counts,
            "neighbours": vars(self.neighbours),
            "known_rows": self.known_rows.state(),
            "names": self.names,
        }
        save_torch(path, to_cpu(payload))

    @classmethod
    def load(cls, directory: str | Path, device: torch.device) -> Predictor:
        """The predictor of a directory; raises DataError."""
        path = Path(directory) / FILE
        payload = load_torch(path)
        if payload.get("format") != _FORMAT:
            raise DataError(f"{path}: not a predictor of this version")
        with payload_errors(payload, "predictor"):
            config = PredictorConfig.model_validate(payload["config"])
            tokenizer = Tokenizer.from_payload(payload["tokenizer"])
            standardizer = Standardizer(**payload["standardizer"])
            parameters, channels, dimensions = map(int, payload["shape"])
            periodic = tuple(map(bool, payload.get("periodic", ())))  # not in files of earlier versions
            shape = InputShape(parameters, channels, dimensions, periodic)
            network, regression = build_networks(tokenizer, shape, config)
            network.load_state_dict(payload["network"])
            regression.load_state_dict(payload["regression"])
            network.eval().requires_grad_(False)
            regression.eval().requires_grad_(False)
            return cls(
                config,
                tokenizer,
                shape,
                str(payload["sha256"]),
                network,
                regression,
                standardizer,
                list(payload["counts"]),
                Neighbours(**payload["neighbours"]),
                KnownRows.from_state(payload["known_rows"]),
                names if (names := payload.get("names")) is None else checked_strings(names, "names", parameters),
            ).to(device)


def _in_words(shape: InputShape) -> str:
    fields = "no fields"
    if shape.channels:
        fields = f"{shape.channels} channels of fields in {shape.dimensions} dimensions"
        names = zip(AXIS_NAMES[shape.dimensions], shape.periodic, strict=False)
        fields += f", periodic: {''.join(name for name, wraps in names if wraps) or 'none'}" if shape.periodic else ""
    return f"{shape.parameters} parameters and {fields}"


def build_networks(
    tokenizer: Tokenizer, shape: InputShape, config: PredictorConfig
) -> tuple[TokenNetwork, InputNetwork]:
    """The network of tokens, and that of features, with weights from torch's random state."""
    model = tokenizer.model
    categories = [name.rpartition("/")[0] for name in model.codebook_names]
    earlier = earlier_levels(categories, config.autoregressive)
    network = TokenNetwork(shape, model.quantizer.num_codes, earlier, config)
    return network, InputNetwork(shape, model.config.input_dim, config)


def differing_settings(saved: Mapping[str, Any], config: PredictorConfig) -> list[str]:
    """Names of settings that differ from saved ones, without num_epochs, which a resumed training may change."""
    now = config.model_dump(mode="json")
    return [name for name in now if name != "num_epochs" and saved.get(name) != now[name]]
