"""Fits of the decoder after training.

The fit of the token decoder alternates: search of the joint tokens of the training rows, then steps of Adam on these.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spinlock_fast.config.schema import RunConfig, TrainingConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.distributed import Ranks
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.models.code_search import TokenSearch, joint_codes
from spinlock_fast.models.decoder_refit import refit_decoder
from spinlock_fast.models.eval_mode import eval_mode
from spinlock_fast.models.joint_metrics import joint_metrics
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.training.distributed import broadcast_model

log = logging.getLogger(__name__)

_RATE = 1e-3  # of Adam, at the start; cosine decay to zero
_PASSES = 3  # over the tokens of a search, before tokens are searched again
_NEAREST = 0.5  # share of rows that have nearest tokens, with the shared decoder's output as target
_EXCHANGED = 0.15  # share of these tokens that are taken from another row
_SEARCH = TokenSearch("joint", sweeps=1)
_ROWS = 1 << 16  # searched at once
_AUTO_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 3000, 5, 60


def joint_search_epochs(training: TrainingConfig, rows: int) -> int:
    """Epochs of the fit of the token decoder to so many training rows."""
    if training.joint_search_epochs != "auto":
        return training.joint_search_epochs
    steps = _PASSES * -(-rows // training.batch_size)
    return min(max(round(_AUTO_STEPS / steps), _FEWEST_EPOCHS), _MOST_EPOCHS)


def fit_decoders(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    x_val: Rows,
    config: RunConfig,
    ranks: Ranks,
    stop_requested: Callable[[], bool],
) -> None:
    """The fits that the settings ask for, by rank 0, for the models of all ranks; see `fit_token_decoder`."""
    training = config.training
    if not (training.decoder_refit or training.joint_search_epochs):
        return
    if training.decoder_refit and ranks.is_main:
        refit_decoder(model, x, training.decoder_refit)
    if training.joint_search_epochs and ranks.is_main:
        fit_token_decoder(model, x, x_val, training, config.random_seed, stop_requested)
    if ranks.broadcast_object(model.token_decoder is not None) and not ranks.is_main:
        model.add_token_decoder()
    broadcast_model(model, ranks)


def fit_token_decoder(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    x_val: Rows,
    training: TrainingConfig,
    seed: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Adds a decoder fitted to the joint tokens of rows x [N, F]; codes, encoders and nearest tokens stay.

    Additive quantizers are trained by alternating search and fit (Babenko and Lempitsky 2014). Here the decoder has a
    hidden layer, and rows are augmented as in training (mixup and noise of the settings), with new tokens each epoch.
    Half of the rows have nearest tokens, with the output of the shared decoder as target: with the rows themselves as
    target, the error of held-out rows with nearest tokens grows more.

    The decoder is kept if it lowers the error of the joint search on the validation rows.

    Args:
        model: a trained model, changed in place.
        x, x_val: [N, F] training and validation rows, finite, for the model's device.
        training: epochs (see `joint_search_epochs`), batch size, mixup and noise.
        seed: of the order of rows, the augmentation and the choice of rows with nearest tokens.
        stop_requested: asked after every block of rows; true ends the fit, and the model gets no decoder.
    """
    started, epochs = time.perf_counter(), joint_search_epochs(training, len(x))
    before = _joint_error(model, x_val)
    log.info("fitting the decoder to joint tokens: %d epochs of %s rows", epochs, f"{len(x):,}")
    decoder = model.add_token_decoder()
    parameters = [tensor.requires_grad_() for tensor in decoder.buffers()]
    optimizer = torch.optim.Adam(parameters, lr=_RATE, fused=True)
    random = torch.Generator(x.device).manual_seed(seed)
    try:
        with eval_mode(model):
            for epoch in range(epochs):
                for done, (target, tokens) in _searched_blocks(model, x, training, 1.0 - epoch / epochs, random):
                    if stop_requested():
                        model.token_decoder = None
                        return
                    for group in optimizer.param_groups:
                        group["lr"] = _RATE * 0.5 * (1.0 + math.cos(math.pi * (epoch + done) / epochs))
                    with single_thread(x.device):  # a result does not depend on the number of threads
                        _fit_block(model, target, tokens, optimizer, training.batch_size, random)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    after = _joint_error(model, x_val)
    seconds = time.perf_counter() - started
    text = "error of the joint search on the validation rows %.4f -> %.4f (%.1f s)"
    if after < before:
        log.info("decoder fitted to joint tokens: " + text, before, after, seconds)
    else:
        model.token_decoder = None
        log.warning("the decoder fitted to joint tokens is not kept: " + text, before, after, seconds)


def _joint_error(model: CategoricalHierarchicalVQVAE, x: Rows) -> float:
    return float(joint_metrics(model, x)["reconstruction_error"])


@torch.no_grad()
def _searched_blocks(
    model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig, mixup_factor: float, random: torch.Generator
) -> Iterator[tuple[float, tuple[Tensor, Tensor]]]:
    """Blocks of all rows in random order: (share of the rows before the block, (targets [n, F], tokens [n, G]))."""
    decoder = model.token_decoder
    assert decoder is not None
    scale = training.mixup_scale * (mixup_factor if training.mixup_decay else 1.0)
    done = 0
    for rows in torch.randperm(len(x), generator=random, device=x.device).split(_ROWS):
        target = x[rows]
        if scale:
            u = scale * (2.0 * torch.rand(len(rows), 1, generator=random, device=x.device) - 1.0)
            target = torch.lerp(target, target.roll(-1, 0), u)
        latents = model.encode(target + training.input_noise * _normal(target, random))
        nearest = model.quantizer.assign(latents).codes
        joint = joint_codes(target, latents, nearest, model.quantizer, decoder, _SEARCH)
        exchanged = torch.rand(nearest.shape, generator=random, device=x.device) < _EXCHANGED
        nearest = torch.where(exchanged, nearest.roll(-1, 0), nearest)
        keeps = torch.rand(len(rows), 1, generator=random, device=x.device) < _NEAREST
        target = torch.where(keeps, model.decode(model.quantizer.lookup(nearest)), target)
        yield done / len(x), (target, torch.where(keeps, nearest, joint))
        done += len(rows)


def _normal(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=random, device=like.device, dtype=like.dtype)


def _fit_block(
    model: CategoricalHierarchicalVQVAE,
    target: Tensor,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    random: torch.Generator,
) -> None:
    """Steps of Adam on a block of rows, all of them `_PASSES` times."""
    decoder = model.token_decoder
    assert decoder is not None
    for _ in range(_PASSES):
        for rows in torch.randperm(len(target), generator=random, device=target.device).split(batch_size):
            optimizer.zero_grad()
            (decoder(tokens[rows]) - target[rows]).square().mean().backward()
            optimizer.step()
