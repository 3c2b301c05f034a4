"""Codebooks trained by several processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spinlock_fast.quantize import GroupedVectorQuantizer

SIZES = ([5, 3], [3, 2])
INITS = ("uniform", "kmeans")


def latents(step):
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(step))


def make(init):
    torch.manual_seed(0)
    return GroupedVectorQuantizer(*SIZES, decay=0.9, codebook_init=init)


def worker(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for init in INITS:
        quantizer = make(init)
        for step in range(4):
            # Uneven shares: the number of rows must not matter to the communication.
            share = latents(step)[:30] if rank == 0 else latents(step)[30:]
            quantizer(share)
        state = {**quantizer.state_dict(), "usage": quantizer.usage, "rows": quantizer.rows_seen}
        torch.save(state, f"{file}.{init}.{rank}")
    dist.destroy_process_group()


@pytest.mark.dist
def test_processes_share_one_update(tmp_path):
    file = tmp_path / "rendezvous"
    mp.spawn(worker, (2, str(file)), nprocs=2)
    for init in INITS:
        first, second = (torch.load(f"{file}.{init}.{rank}", weights_only=True) for rank in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
        assert first["rows"] == 160
        if init == "uniform":  # as one process sees all rows
            alone = make(init)
            for step in range(4):
                alone(latents(step))
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(first["usage"], alone.usage)
