"""Quantizers trained by several processes: many checks in one launch of four processes."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spinlock_fast import GroupedResidualVQ, GroupedVectorQuantizer, ResidualVQ, VectorQuantize
from spinlock_fast.compat import VectorQuantizer

D = 4
WORLD = 4
KINDS = {
    "vector": lambda **more: VectorQuantize(D, 6, **more),
    "k-means": lambda **more: VectorQuantize(D, 6, kmeans_init=True, **more),
    "in place": lambda **more: VectorQuantize(
        D, 6, learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=sgd, **more
    ),
    "stages": lambda **more: ResidualVQ(dim=D, codebook_size=6, num_quantizers=2, threshold_ema_dead_code=1, **more),
    "groups": lambda **more: GroupedResidualVQ(
        dim=D, codebook_size=6, num_quantizers=3, groups=2, quantize_dropout=True, **more
    ),
    "grouped": lambda **more: GroupedVectorQuantizer([5, 3], [3, 1], **more),
    "grouped, learned": lambda **more: GroupedVectorQuantizer([5, 3], [3, 1], use_ema=False, **more),
    "original": lambda **more: VectorQuantizer(6, D, **more),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def make(kind, **more):
    torch.manual_seed(0)
    return KINDS[kind](**more)


def latents(step, rows=80):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(step))


def same_on(quantizer, ranks):
    """Asserts that a state is finite and equal in these processes."""
    state = [value for value in quantizer.state_dict().values() if value.is_floating_point()]
    mine = torch.cat([value.double().flatten() for value in state])
    everywhere = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(everywhere, mine)
    assert mine.isfinite().all()
    for rank in ranks:
        assert torch.equal(everywhere[rank], mine)
    return everywhere


def loss_of(returned):
    return returned[2]["loss"] if isinstance(returned[2], dict) else returned[2].sum()


def built_before_the_group(rank, built):
    """Layers constructed before the process group share updates: the state is that of one process with all rows."""
    for kind in ("vector", "in place", "original"):
        quantizer = built[kind]
        alone = copy.deepcopy(quantizer)
        for step in range(2):
            quantizer(latents(step).chunk(WORLD)[rank])
        same_on(quantizer, range(WORLD))
        if kind == "in place":  # the mean of the processes' gradients, of as many rows each
            continue
        disable_sync(alone)
        for step in range(2):
            alone(latents(step))
        torch.testing.assert_close(quantizer.state_dict(), alone.state_dict())


def disable_sync(quantizer):
    """Disables synchronisation of a quantizer."""
    group = ALONE[dist.get_rank()]
    quantizer.process_group = group


def halves(rank, groups):
    """Each half of the processes trains its own quantizer."""
    first = rank - rank % 2
    for kind in KINDS:
        quantizer = make(kind, process_group=groups[rank // 2])
        for module in (quantizer, copy.deepcopy(quantizer)):
            for step in range(2):
                torch.manual_seed(10 * step + rank)
                module(latents(step).chunk(WORLD)[rank])
            everywhere = same_on(module, (first, first + 1))
            assert not torch.equal(everywhere[0], everywhere[2]), kind
        if kind == "vector":
            alone = make(kind, sync_codebook=False)
            for step in range(2):
                alone(torch.cat(latents(step).chunk(WORLD)[first : first + 2]))
            torch.testing.assert_close(quantizer.state_dict(), alone.state_dict())
            assert torch.equal(quantizer._codebook.usage, alone._codebook.usage)


def mesh_counts_rows_once(rank):
    """On a 2 x 2 mesh, replicas along one dimension get the same rows."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    rows = latents(0).chunk(2)[mesh.get_local_rank("data")]
    for kind in ("vector", "stages", "grouped"):
        quantizer = make(kind, process_group=mesh.get_group("data"))
        quantizer(rows)
        usage = quantizer.usage if kind == "grouped" else next(b for n, b in quantizer.named_buffers() if "usage" in n)
        assert usage.sum() == (160 if kind == "grouped" else 80), kind
        if kind == "grouped":
            assert quantizer.rows_seen == 80
        if kind != "stages":  # dead codes become random rows
            same_on(quantizer, range(WORLD))


def empty_and_masked_rows(rank):
    """Processes with no rows, only masked rows, or different numbers of rows: no NaN, and a loss of 0 without rows."""
    for kind in KINDS:
        quantizer = make(kind)
        for step in range(3):
            torch.manual_seed(step)
            x = latents(step)[: (0, 12, 25, 7)[(rank + step) % 4]].requires_grad_()
            mask = {}
            if kind not in ("original", "groups", "stages") and (rank + step) % 4 == 1:
                mask = {"mask": torch.zeros(len(x), dtype=torch.bool)}
            if kind not in ("grouped", "grouped, learned", "original"):
                x = x.detach()[None].requires_grad_()
                mask = {name: value[None] for name, value in mask.items()}
            if kind == "original" and len(x) == 0:
                x = latents(step)[:3].requires_grad_()
            returned = quantizer(x, **mask)
            loss = loss_of(returned)
            assert loss.isfinite(), kind
            assert not mask or (loss == 0.0 and not returned[0].any()), kind
            (returned[0].sum() + loss).backward()
            assert x.grad is None or x.grad.isfinite().all()
        same_on(quantizer, range(WORLD))


def kmeans_initialization(rank):
    """Every process has a different cluster, one of a single row: the codes cover all of them."""
    centres = 20.0 * torch.eye(4)
    rows = centres[rank] + 0.1 * latents(rank, 1 if rank == 3 else 50)
    quantizers = {
        "vector": VectorQuantize(D, 4, kmeans_init=True, kmeans_iters=20),
        "stages": ResidualVQ(dim=D, codebook_size=4, num_quantizers=2, kmeans_init=True),
        "grouped": GroupedVectorQuantizer([4], [D]),
        "initialized": GroupedVectorQuantizer([4], [D]),
    }
    for kind, quantizer in quantizers.items():
        torch.manual_seed(100 + rank)
        nothing = torch.full((3, D), torch.nan)
        quantizer.train()(nothing)  # a first batch without a row that counts
        if kind == "initialized":
            quantizer.initialize(rows)
        else:
            quantizer(rows)
        same_on(quantizer, range(WORLD))
        assert (quantizer.eval()(rows)[0] - rows).square().mean() < (1.0 if kind == "grouped" else 110.0), kind
        if kind in ("grouped", "initialized"):
            assert (quantizer(rows)[0] - rows).square().mean() < 1.0, kind
            assert quantizer.cluster_size.sum() == pytest.approx(151, rel=0.02)


def pickled_groups_are_lost(rank, groups):
    quantizer = make("vector", process_group=groups[rank // 2])
    loaded = pickle.loads(pickle.dumps(quantizer))
    again = io.BytesIO()
    torch.save(loaded, again)
    for module in (loaded, torch.load(io.BytesIO(again.getvalue()), weights_only=False)):
        with pytest.raises(RuntimeError, match="a process group cannot be pickled"):
            module(latents(0))
        module.eval()(latents(0))
        module.train().process_group = groups[rank // 2]
        module(latents(rank))
    pickle.loads(pickle.dumps(make("vector")))(latents(0))  # of all processes


ALONE: list = []


def worker(rank, file):
    torch.set_num_threads(1)
    built = {kind: make(kind) for kind in KINDS}
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    ALONE.extend(dist.new_group([other]) for other in range(WORLD))
    built_before_the_group(rank, built)
    halves(rank, groups)
    mesh_counts_rows_once(rank)
    empty_and_masked_rows(rank)
    kmeans_initialization(rank)
    pickled_groups_are_lost(rank, groups)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_four_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path / "rendezvous"),), nprocs=WORLD)
