"""Quantizers under FSDP2 (`fully_shard`): the training of two processes is that of one with all rows."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from autoencoder import KINDS, RANDOM_KINDS, assert_same, load, make, optimizer_of, state_of, train
from autoencoder_ranks import assert_equal_ranks, compare, run_checks, share, trained, uneven_share
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.dist


def parts(module):
    """Each part of the autoencoder is gathered and freed by itself."""
    for part in (module.encoder, module.quantizer, module.decoder):
        fully_shard(part)
    return fully_shard(module)


# Kinds of the fast tier.
SHORT = ("orthogonal", "original", "packed, learned", "stages")


def equals_one_process(rank, kinds=tuple(KINDS), wraps=(fully_shard, parts)):
    for kind in kinds:
        for wrap in wraps:
            compare(kind, wrap, rank)


def some_equal_one_process(rank):
    equals_one_process(rank, SHORT, (parts,))


def equals_ddp(rank, kinds=tuple(RANDOM_KINDS)):
    """Random draws are those of DDP: codes written to gathered parameters are in the shards."""
    for kind in kinds:
        shares = [share(step, rank) for step in range(6)]
        expected = state_of(trained(kind, DistributedDataParallel, rank, shares))
        for wrap in (fully_shard, parts):
            assert_same(state_of(trained(kind, wrap, rank, shares)), expected, kind)


def written_codes_equal_ddp(rank):
    equals_ddp(rank, ("learned, resets", "packed, learned, k-means"))


def shares_without_rows(rank):
    for kind in [*KINDS, *RANDOM_KINDS]:
        trained(kind, fully_shard, rank, [uneven_share(step, rank) for step in range(4)])


def mixed_precision(rank):
    """Parameters in bfloat16: averages and buffers stay float32, shards keep the precision of what is not written."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in ("averages", "orthogonal", "stages", "packed", "learned, resets", "original"):
        module = trained(kind, partial(fully_shard, mp_policy=policy), rank, [share(step, rank) for step in range(6)])
        state = state_of(module)
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}, kind
        if kind != "original":  # small steps of float32, which bfloat16 would round away
            rounded = state["decoder.weight"].bfloat16().float()
            assert not torch.equal(state["decoder.weight"], rounded)
    module = make("learned, resets")
    module.quantizer._codebook.threshold_ema_dead_code = 1e-9  # no code is dead: nothing is written
    before = module.quantizer.codebook.detach().clone()
    fully_shard(module, mp_policy=policy)
    module(share(0, rank))
    assert torch.equal(state_of(module)["quantizer._codebook.embed"][0], before)


def stored_state(module):
    """The state without usage counts, which a state dict does not contain."""
    return {name: value for name, value in state_of(module).items() if not name.endswith("usage")}


def reload(rank, directory):
    """Full and sharded checkpoints continue the training, and load in one process."""
    for kind in ("averages", "stages, resets", "packed, learned, k-means", "original"):
        module = parts(make(kind))
        torch.manual_seed(rank)
        optimizer = train(module, [share(step, rank) for step in range(4)])
        model_state, optimizer_state = get_state_dict(module, optimizer)
        where = f"{directory}/{kind.replace(' ', '').replace(',', '-')}"
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=where)
        full = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        again = parts(make(kind))
        other = optimizer_of(again)
        states = dict(zip(("model", "optimizer"), get_state_dict(again, other), strict=True))
        dcp.load(states, checkpoint_id=where)
        set_state_dict(again, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        for run, used in ((module, optimizer), (again, other)):
            torch.manual_seed(10 + rank)
            train(run, [share(step, rank) for step in range(4, 7)], used)
        assert_same(stored_state(again), stored_state(module), kind)
        from_first = parts(make(kind))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(from_first, dict(full) if rank == 0 else {}, options=options)
        assert_equal_ranks(from_first, kind)
        from_first(share(9, rank)).backward()
        if rank == 0:
            file = f"{directory}/full.pt"
            torch.save(full, file)
            assert_same(stored_state(load(kind, torch.load(file, weights_only=True))), full, kind)


def meta_device(rank):
    """Built on the meta device, sharded, and filled from a state dict."""
    for kind in ("averages", "stages, resets", "packed, learned, k-means", "original"):
        source = make(kind)
        with torch.device("meta"):
            module = make(kind)
        parts(module).to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, dict(source.state_dict()) if rank == 0 else {}, options=options)
        torch.manual_seed(rank)
        train(module, [share(step, rank) for step in range(4)])
        expected = state_of(trained(kind, DistributedDataParallel, rank, [share(step, rank) for step in range(4)]))
        assert_same(state_of(module), expected, kind)


def codes_outside_of_forward(rank):
    """Setting, initialising and resetting codes that are sharded parameters."""
    module = fully_shard(make("learned"))
    codes = torch.arange(24.0).view(6, 4)
    module.quantizer.codebook = codes
    assert torch.equal(state_of(module)["quantizer._codebook.embed"][0], codes)
    packed = fully_shard(make("packed, learned"))
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(3)).chunk(2)[rank]
    packed.quantizer.initialize(rows)
    before = assert_equal_ranks(packed, "initialize")["quantizer.embedding"]
    torch.manual_seed(rank)
    assert packed.quantizer.reset_dead_codes(threshold=1.0, max_fraction=1.0).sum() > 0
    assert not torch.equal(assert_equal_ranks(packed, "reset")["quantizer.embedding"], before)


def in_place_optimizers_are_refused(rank):
    module = fully_shard(make("in place"))
    with pytest.raises(RuntimeError, match="in_place_codebook_optimizer was built for parameters that are no longer"):
        module(share(0, rank))


def test_two_processes_equal_one(tmp_path):
    checks = (
        some_equal_one_process,
        written_codes_equal_ddp,
        mixed_precision,
        partial(reload, directory=str(tmp_path)),
    )
    run_checks((*checks, meta_device, codes_outside_of_forward, in_place_optimizers_are_refused), tmp_path)


@pytest.mark.slow
def test_every_kind(tmp_path):
    run_checks((equals_one_process, equals_ddp, shares_without_rows), tmp_path)
