"""Modules that a run needs later, imported while it reads rows: together they take seconds."""

from __future__ import annotations

import threading
from contextlib import suppress
from importlib import import_module

import torch

_ALWAYS = (
    "scipy.cluster.hierarchy",  # categories
    "scipy.spatial.distance",
    "torch.fx.experimental.symbolic_shapes",  # torch.autograd, where a gradient is given to it
)
_ON_CUDA = (
    "spinlock_fast.kernels.adam.triton",
    "spinlock_fast.kernels.augment.triton",
    "spinlock_fast.kernels.code_decoders.triton",
    "spinlock_fast.kernels.ema_update.triton",
    "spinlock_fast.kernels.grouped_mlp.projection",
    "spinlock_fast.kernels.topo_loss.cuda",
    "spinlock_fast.kernels.vq_assign.dispatch",
)


def import_ahead(device: torch.device, tensorboard: bool) -> threading.Thread:
    """Starts to import; what cannot be imported is left to who needs it.

    Args:
        device: of the training.
        tensorboard: whether scalars may be written for it.
    """
    names = [*_ALWAYS, *(_ON_CUDA if device.type == "cuda" else ())]
    if tensorboard:
        names.append("torch.utils.tensorboard")
    thread = threading.Thread(target=_import, args=(names,), name="imports")
    thread.start()
    return thread


def _import(names: list[str]) -> None:
    for name in names:
        with suppress(Exception):  # it will be raised again where it is imported for use
            import_module(name)
