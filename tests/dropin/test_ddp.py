"""Quantizers under `DistributedDataParallel`: the training of two processes is that of one with all rows.

Of the random draws, those of `quantize_dropout` are the first process's. Replacements of dead codes and the seeds of
k-means are rows that each process draws from its own share, so that codes differ from those of one process.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from autoencoder import (
    KINDS,
    RANDOM_KINDS,
    assert_same,
    batch,
    load,
    make,
    optimizer_of,
    state_of,
    train,
)
from autoencoder_ranks import (
    alone,
    assert_equal_ranks,
    compare,
    group_of_one,
    run_checks,
    share,
    trained,
    uneven_share,
)
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.dist


def equals_one_process(rank):
    for kind in KINDS:
        compare(kind, DistributedDataParallel, rank)


def float64_is_not_rounded(rank):
    """Sums over processes are in the dtype of the averages."""
    torch.set_default_dtype(torch.float64)
    try:
        for kind in ("averages", "stages"):
            module = trained(kind, DistributedDataParallel, rank, [share(step, rank).double() for step in range(5)])
            expected = alone(kind, [batch(step).double() for step in range(5)])
            for name, value in state_of(module).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)
    finally:
        torch.set_default_dtype(torch.float32)


def random_rows_are_shared(rank):
    """k-means and resets: equal codes in all processes, with an error like that of one process."""
    for kind in RANDOM_KINDS:
        module = trained(kind, DistributedDataParallel, rank, [share(step, rank) for step in range(20)])
        expected = load(kind, alone(kind, [batch(step) for step in range(20)]))
        with torch.no_grad():
            error, error_alone = (each.eval()(batch(99)) for each in (module, expected))
        assert error < 1.4 * error_alone, kind
        for name, value in state_of(module).items():
            if "resets" in kind and name.endswith("cluster_size"):
                assert value.min() >= 2, kind  # the threshold: no code is dead after a step


def shares_without_rows(rank):
    """Every third step has an empty share: every parameter still takes part in the backward pass."""
    for kind in [*KINDS, *RANDOM_KINDS]:
        trained(kind, DistributedDataParallel, rank, [uneven_share(step, rank) for step in range(4)])


def options_of_ddp(rank):
    for options in (
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True, "broadcast_buffers": False},
    ):
        for kind in ("learned", "orthogonal", "stages", "packed, learned", "original"):
            compare(kind, partial(DistributedDataParallel, **options), rank, steps=6)


def accumulated(wrapped, shares, no_sync):
    optimizer = optimizer_of(wrapped)
    for step, x in enumerate(shares):
        with no_sync() if step % 2 == 0 else nullcontext():
            wrapped(x).backward()
        if step % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def gradient_accumulation(rank):
    """`no_sync` delays the reduction of gradients, but not that of averages."""
    for kind in ("averages", "orthogonal", "packed, learned", "original"):
        module, other = make(kind), make(kind)
        other.quantizer.process_group = group_of_one()
        wrapped = DistributedDataParallel(module)
        accumulated(wrapped, [share(step, rank) for step in range(8)], wrapped.no_sync)
        accumulated(other, [batch(step) for step in range(8)], nullcontext)
        assert_same(assert_equal_ranks(module, kind), state_of(other), kind)


def two_passes_before_backward(rank):
    """Buffers are broadcast, and codes updated, between the forward and the backward pass of the first call."""
    for kind in (*KINDS, "in place"):
        module, other = make(kind), make(kind)
        other.quantizer.process_group = group_of_one()
        for run, x in ((DistributedDataParallel(module), lambda step: share(step, rank)), (other, batch)):
            optimizer = optimizer_of(run)
            torch.manual_seed(0)
            for step in range(3):
                optimizer.zero_grad()
                (run(x(step)) + run(x(step + 50))).backward()
                optimizer.step()
        assert_same(assert_equal_ranks(module, kind), state_of(other), kind)


def subgroups(rank):
    """A quantizer with a group of its own has codes of its own, if DDP does not broadcast its buffers."""
    for kind in ("averages", "stages", "packed", "packed, k-means"):
        module = make(kind, process_group=group_of_one())
        train(DistributedDataParallel(module, broadcast_buffers=False), [share(step, rank) for step in range(3)])
        usage = [value for name, value in state_of(module).items() if name.endswith("usage")]
        assert all(value.sum() in (72, 144) for value in usage), kind  # of 3 steps of 24 rows; two codebooks in one
        weights: list = [None, None]
        dist.all_gather_object(weights, state_of(module))
        assert torch.equal(weights[0]["encoder.0.weight"], weights[1]["encoder.0.weight"])
        averages = next(name for name in weights[0] if name.endswith("cluster_size"))
        assert not torch.equal(weights[0][averages], weights[1][averages]), kind


def resets_draw_once(rank):
    """`GroupedVectorQuantizer.reset_dead_codes` replaces codes by the same values in all processes."""
    for kind in ("packed", "packed, learned"):
        module = trained(kind, DistributedDataParallel, rank, [share(step, rank) for step in range(3)])
        torch.manual_seed(rank)
        assert module.quantizer.reset_dead_codes(threshold=1.0, max_fraction=1.0).sum() > 0
        assert_equal_ranks(module, kind)


def compiled(rank):
    """`torch.compile` of the module that DDP wraps, and of DDP's own."""
    for kind in ("learned", "stages"):
        torch._dynamo.reset()
        compare(kind, lambda module: torch.compile(DistributedDataParallel(module)), rank, steps=4)
    for kind in ("packed, learned", "original"):
        torch._dynamo.reset()
        compare(kind, lambda module: DistributedDataParallel(torch.compile(module, backend="aot_eager")), rank, steps=4)
    for kind in ("dropout", "stages, resets", "packed, k-means"):
        torch._dynamo.reset()
        shares = [uneven_share(step, rank) for step in range(4)]
        trained(kind, lambda module: torch.compile(DistributedDataParallel(module), backend="aot_eager"), rank, shares)


def dropout_draws(rank):
    """The number of stages is the first process's draw, also in compiled graphs: uniformly distributed."""
    for draw in (
        lambda quantizer: quantizer._num_stages_from_seed(torch.device("cpu"), None),
        lambda quantizer: int(quantizer.draw_num_stages(torch.device("cpu"))),
    ):
        quantizer = make("dropout").quantizer
        torch.manual_seed(rank)
        found = [draw(quantizer) for _ in range(20)]
        quantizer.process_group = group_of_one()
        torch.manual_seed(0)
        assert found == [draw(quantizer) for _ in range(20)]


def affine_statistics(rank):
    """`sync_affine_param` forms means and variances over the rows of all processes."""
    compare("affine", DistributedDataParallel, rank)
    trained("affine", DistributedDataParallel, rank, [uneven_share(step, rank) for step in range(4)])


def group_created_late(rank, file):
    """Averages are summed from the first step after `init_process_group` on; DDP starts from the first process's."""
    kinds = ("averages", "stages", "packed, k-means", "k-means", "original")
    modules = {kind: make(kind) for kind in kinds}
    modules["compiled"] = make("averages")
    modules["compiled"].compile(backend="aot_eager")
    for module in modules.values():
        torch.manual_seed(rank)
        train(module, [share(step, rank) for step in range(2)])
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for kind, module in modules.items():
        train(DistributedDataParallel(module), [share(step, rank) for step in range(2, 5)])
        assert_equal_ranks(module, kind)
    dist.destroy_process_group()
    for module in modules.values():
        module(batch(0))  # one process again


def test_two_processes_equal_one(tmp_path):
    checks = (
        equals_one_process,
        float64_is_not_rounded,
        shares_without_rows,
        resets_draw_once,
        dropout_draws,
        affine_statistics,
    )
    run_checks(checks, tmp_path)


@pytest.mark.slow
def test_options_and_orders_of_passes(tmp_path):
    checks = (options_of_ddp, gradient_accumulation, two_passes_before_backward, subgroups, random_rows_are_shared)
    run_checks(checks, tmp_path, group_created_late)


@pytest.mark.slow
def test_compiled(tmp_path):
    run_checks((compiled,), tmp_path)
