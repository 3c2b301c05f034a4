"""Data-parallel training: ranks that share each batch compute what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import planted_matrix
from processes import run_ranks
from torch import Tensor

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.distributed import Ranks, current_ranks
from spinlock_fast.errors import ConfigError, DataError, TrainingError
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.distributed import StepExchange, check_replicas
from spinlock_fast.training.trainer import Trainer

pytestmark = pytest.mark.dist

SIZES = [6, 9, 5]
GROUPS = {"a": list(range(6)), "b": list(range(6, 15)), "c": list(range(15, 20))}
ROWS = 301
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "training.batch_size": 50,
    "training.topo_samples": 32,
    "training.num_epochs": 3,
    "training.val_every_n_epochs": 1,
    "training.mixup_scale": 0.3,
    "training.input_noise": 0.1,
    "model.dropout": 0.2,
    "training.orthogonality_target": 10.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "learned codes": {"model.use_ema": False, "training.orthogonality_weight": 0.5},
    "resets": {
        "training.dead_code_strategy": "sample",
        "training.dead_code_reset_steps": 4,
        "training.dead_code_reset_interval": 1,
        "training.dead_code_threshold": 0.5,
    },
    # 240 training rows: only the last rank has a row in the last step of an epoch
    "one row left": {"training.batch_size": 239},
    "one row left, learned codes": {
        "training.batch_size": 239,
        "model.use_ema": False,
        "training.orthogonality_weight": 0.5,
    },
    "host memory": {"training.data_on_device": "never", "training.mixup_decay": True},
    "token decoder": {"training.joint_search_epochs": 2, "training.num_epochs": 1},
}


def settings(**changes: Any) -> RunConfig:
    return apply_overrides(RunConfig(), {**SETTINGS, **changes})


def rows() -> Any:
    return planted_matrix(ROWS, SIZES, seed=0)


def fit(config: RunConfig) -> dict[str, Any]:
    result = Trainer(config).fit(rows(), GROUPS, normalize=False, val_rows=np.arange(0, ROWS, 5))
    run = result.final_state
    return {
        "weights": run["model_state_dict"],
        "usage": run["usage"],
        "best": result.model.state_dict(),
        "losses": torch.tensor([record.train_loss for record in result.history]),
        "terms": torch.tensor([list(record.terms.values()) for record in result.history]),
        "metrics": torch.tensor([result.metrics[name] for name in ("val_loss", "quality", "topo_post", "perplexity")]),
        "sync": result.model.quantizer.sync,
    }


def start(rank: int, world: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)


def fit_variants(rank: int, world: int, file: str) -> None:
    start(rank, world, file)
    torch.set_num_threads(1)
    for name, changes in VARIANTS.items():
        torch.save(fit(settings(**changes)), f"{file}.{name}.{rank}")
    torch.save(misuse(rank) | {"saves": saves(), "huge": huge_validation_row()}, f"{file}.misuse.{rank}")
    dist.destroy_process_group()


def misuse(rank: int) -> dict[str, Any]:
    """What happens to ranks that are given different rows, or hold different weights."""
    outcome: dict[str, Any] = {}
    one_epoch = settings(**{"training.num_epochs": 1})
    try:
        Trainer(one_epoch).fit(rows()[: ROWS - rank], GROUPS)
    except DataError as error:
        outcome["different rows"] = str(error)
    outcome["by itself"] = fit_by_itself(ROWS - rank)
    try:
        Trainer(one_epoch).fit(rows(), GROUPS, val_rows=[0, 1 + rank])
    except ConfigError as error:
        outcome["different arguments"] = str(error)
    try:
        Trainer(settings(**{"training.batch_size": 50 + rank})).fit(rows(), GROUPS)
    except ConfigError as error:
        outcome["different settings"] = str(error)
    model = small_model()
    check_replicas(model, current_ranks(), 7)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-5 * rank
    try:
        check_replicas(model, current_ranks(), 7)
    except TrainingError as error:
        outcome["different weights"] = str(error)
    return outcome


def fit_by_itself(count: int) -> dict[str, Any]:
    """The model of this process alone, also inside a process group."""
    config = settings(**{"training.num_epochs": 1})
    result = Trainer(config, ranks=Ranks()).fit(rows()[:count], GROUPS, normalize=False)
    return {"weights": result.final_state["model_state_dict"]}


def small_model() -> CategoricalHierarchicalVQVAE:
    torch.manual_seed(0)
    return CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=20, group_indices=GROUPS))


def saves() -> list[bool]:
    """Whether the state is saved after each of 5 steps, if a save is due until there is one."""
    exchange, due, saved = StepExchange(small_model(), current_ranks()), True, []
    for _ in range(5):
        exchange.sum_(torch.zeros_like(exchange.statistics), None)
        exchange.request(None, due)
        saved.append(exchange.requested()[1])
        due = due and not saved[-1]
    return saved


def huge_validation_row() -> float:
    """The validation loss of one row, which the last rank measures, and whose squares leave the usual range."""
    x = rows()
    x[5, 0] = 6e8
    return float(Trainer(settings(**{"training.num_epochs": 1})).fit(x, GROUPS, val_rows=[5]).metrics["val_loss"])


def assert_equal(one: Any, other: Any, where: str, tolerance: float) -> None:
    """Equal within rounding, relative to the norm of each tensor."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_equal(value, other[name], f"{where}.{name}", tolerance)
        elif isinstance(value, Tensor):
            difference = float((other[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-3))
            assert difference <= tolerance, f"{where}.{name}: {difference:.2g}"
        else:
            assert value == other[name], f"{where}.{name}"


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_what_one_process_trains(world: int, tmp_path: Path) -> None:
    file = tmp_path / "rendezvous"
    run_ranks(fit_variants, (world, str(file)), world)
    for name, changes in VARIANTS.items():
        alone = fit(settings(**changes))
        ranks = [torch.load(f"{file}.{name}.{rank}", weights_only=True) for rank in range(world)]
        for rank in ranks:
            for key, value in ranks[0]["weights"].items():
                assert torch.equal(rank["weights"][key], value), key
        # Adam divides by the root of mean squares: where a gradient nearly vanishes, its rounding error shows. With
        # learned codes one bias has such gradients; the gradients of a step agree within 3e-7. The token decoder
        # is fitted by many more steps.
        tolerance = {"learned codes": 1e-4, "token decoder": 1e-3}
        assert_equal(alone, ranks[0], name, next((t for part, t in tolerance.items() if part in name), 1e-5))
    for rank in range(world):
        outcome = torch.load(f"{file}.misuse.{rank}", weights_only=True)
        assert outcome["different rows"].startswith(
            "the ranks were given different rows ([301, 20] on rank 0, [300, 20]"
        )
        assert outcome["different arguments"].startswith("the ranks have different values of val_rows: ")
        assert (
            outcome["different settings"]
            == "the ranks have different values of training.batch_size: 50 on rank 0, 51 on rank 1"
        )
        assert outcome["saves"] == [False, True, False, False, False]
        assert outcome["huge"] > 1e12
        assert_equal(fit_by_itself(ROWS - rank), outcome["by itself"], "by itself", 1e-6)
        assert outcome["different weights"].startswith("the ranks hold different weights after step 7")


def fit_without_cpu_tensors(rank: int, file: str) -> None:
    dist.init_process_group("cuda:gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    with pytest.raises(ConfigError, match="connects CUDA tensors only"):
        Trainer(settings()).fit(rows(), GROUPS)
    dist.destroy_process_group()


def test_a_process_group_of_cuda_tensors_is_refused(tmp_path: Path) -> None:
    run_ranks(fit_without_cpu_tensors, (str(tmp_path / "rendezvous"),), 2)
