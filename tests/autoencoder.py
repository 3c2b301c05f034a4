"""A small autoencoder around each kind of quantizer, and its training, for comparisons with frameworks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spinlock_fast import GroupedResidualVQ, GroupedVectorQuantizer, ResidualVQ, VectorQuantize
from spinlock_fast.compat import VectorQuantizer

WIDTH, D, K, ROWS = 6, 4, 6, 24
LEARNED = {"learnable_codebook": True, "ema_update": False}

# Kinds whose training by several processes equals that by one process with all rows.
KINDS: dict[str, Callable[..., nn.Module]] = {
    "averages": functools.partial(VectorQuantize, D, K),
    "learned": functools.partial(VectorQuantize, D, K, **LEARNED),
    "cosine": functools.partial(VectorQuantize, D, K, use_cosine_sim=True),
    "orthogonal": functools.partial(VectorQuantize, D, K, orthogonal_reg_weight=0.1),
    "heads": functools.partial(VectorQuantize, D, K, heads=2, codebook_dim=3, separate_codebook_per_head=True),
    "stages": functools.partial(ResidualVQ, dim=D, codebook_size=K, num_quantizers=4),
    "dropout": functools.partial(ResidualVQ, dim=D, codebook_size=K, num_quantizers=4, quantize_dropout=True),
    "shared": functools.partial(ResidualVQ, dim=D, codebook_size=K, num_quantizers=3, shared_codebook=True),
    "learned stages": functools.partial(ResidualVQ, dim=D, codebook_size=K, num_quantizers=2, **LEARNED),
    "groups": functools.partial(GroupedResidualVQ, dim=D, codebook_size=K, num_quantizers=2, groups=2),
    "packed": functools.partial(GroupedVectorQuantizer, [5, 3], [3, 1], codebook_init="uniform"),
    "packed, learned": functools.partial(
        GroupedVectorQuantizer, [5, 3], [3, 1], codebook_init="uniform", use_ema=False
    ),
    "original": functools.partial(VectorQuantizer, K, D),
    "original, learned": functools.partial(VectorQuantizer, K, D, use_ema=False),
}
# Kinds of single tests.
OTHER_KINDS: dict[str, Callable[..., nn.Module]] = {
    "affine": functools.partial(VectorQuantize, D, K, affine_param=True, sync_affine_param=True),
    "in place": functools.partial(
        VectorQuantize, D, K, **LEARNED, in_place_codebook_optimizer=lambda codes: torch.optim.SGD(codes, lr=0.1)
    ),
}
# Kinds that draw random rows: each process draws its own, so codes differ from those of one process.
RANDOM_KINDS: dict[str, Callable[..., nn.Module]] = {
    "k-means": functools.partial(VectorQuantize, D, K, kmeans_init=True),
    "learned, k-means": functools.partial(VectorQuantize, D, K, kmeans_init=True, **LEARNED),
    "resets": functools.partial(VectorQuantize, D, K, threshold_ema_dead_code=2),
    "learned, resets": functools.partial(VectorQuantize, D, K, threshold_ema_dead_code=2, **LEARNED),
    "stages, resets": functools.partial(
        ResidualVQ, dim=D, codebook_size=K, num_quantizers=4, kmeans_init=True, threshold_ema_dead_code=2
    ),
    "packed, k-means": functools.partial(GroupedVectorQuantizer, [5, 3], [3, 1]),
    "packed, learned, k-means": functools.partial(GroupedVectorQuantizer, [5, 3], [3, 1], use_ema=False),
}


class Autoencoder(nn.Module):
    """x [b, n, WIDTH] -> loss, the sum of the reconstruction error and the loss of the quantizer."""

    def __init__(self, kind: str, **more: Any) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, D))
        self.quantizer = {**KINDS, **RANDOM_KINDS, **OTHER_KINDS}[kind](**more)
        self.decoder = nn.Linear(D, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.quantizer(self.encoder(x))
        loss = loss["loss"] if isinstance(loss, dict) else loss.sum()
        # A mean that is 0, with a gradient, for a batch without rows.
        error = (self.decoder(quantized) - x).square().sum() / max(x.numel(), 1)
        return error + loss


def make(kind: str, **more: Any) -> Autoencoder:
    """The same weights for each call with a kind."""
    torch.manual_seed(0)
    return Autoencoder(kind, **more)


def load(kind: str, state: dict[str, Tensor]) -> Autoencoder:
    """An autoencoder with this state."""
    module = make(kind)
    module.load_state_dict({name: value for name, value in state.items() if not name.endswith("usage")})
    return module


def batch(step: int, rows: int = ROWS) -> Tensor:
    """[rows, 2, WIDTH] of clusters, so that nearest codes do not depend on rounding."""
    generator = torch.Generator().manual_seed(step)
    centres = 2.0 * torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(99))
    which = torch.randint(0, 10, (rows, 2), generator=generator)
    return centres[which] + 0.1 * torch.randn(rows, 2, WIDTH, generator=generator)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)


def train(
    module: nn.Module, batches: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """One step per batch."""
    optimizer = optimizer_of(module) if optimizer is None else optimizer
    for x in batches:
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    return optimizer


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """State dict and usage counts, as plain tensors."""
    usage = {name: value for name, value in module.named_buffers() if name.rpartition(".")[2] == "usage"}
    state = {name: value.detach() for name, value in {**module.state_dict(), **usage}.items()}
    return {name: whole(value).clone() for name, value in state.items()}


def whole(value: Any) -> Tensor:
    """A plain tensor of a sharded or plain one."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Equal states within float rounding."""
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{where}: {name}: {text}"
        )
