"""Drop-in quantizers trained by several processes."""

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from spinlock_fast import ResidualVQ, VectorQuantize

OPTIONS = {
    "plain": {},
    "k-means": {"kmeans_init": True},
    "resets": {"threshold_ema_dead_code": 2},
    "cosine": {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
}
CASES = ((False, "resets"), (False, "k-means"), (True, "plain"), (True, "cosine"))


def latents(step):
    return torch.randn(60, 4, generator=torch.Generator().manual_seed(step))


def make(residual, options, **more):
    torch.manual_seed(0)
    if residual:
        return ResidualVQ(dim=4, codebook_size=6, num_quantizers=3, **OPTIONS[options], **more)
    return VectorQuantize(dim=4, codebook_size=6, **OPTIONS[options], **more)


def worker(rank, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    calls = []
    plain = dist.all_reduce
    dist.all_reduce = lambda *arguments, **named: calls.append(1) or plain(*arguments, **named)
    for case, (residual, options) in enumerate(CASES):
        train(rank, make(residual, options), calls, f"{file}.{case}.{rank}")
    dist.destroy_process_group()


def train(rank, quantizer, calls, file):
    torch.manual_seed(rank)
    for step in range(4):
        if step == 1:
            calls.clear()  # k-means has additional collectives
        # Uneven shares, one of them empty: collectives must not depend on size or content.
        share = latents(step)[: 60 if step == 3 else 40] if rank == 0 else latents(step)[60 if step == 3 else 40 :]
        quantizer(share)
    assert len(calls) == 3, "one collective per step"
    usage = quantizer.perplexity()
    torch.save({**quantizer.state_dict(), "perplexity": usage}, file)


@pytest.mark.dist
def test_processes_end_with_equal_states(tmp_path):
    file = tmp_path / "rendezvous"
    run_ranks(worker, (2, str(file)), 2)
    for case, (residual, options) in enumerate(CASES):
        check(*(torch.load(f"{file}.{case}.{rank}", weights_only=True) for rank in range(2)), residual, options)


def check(first, second, residual, options):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert all(torch.isfinite(value).all() for value in first.values())
    if options == "plain":  # equal to one process with all rows
        alone = make(residual, options)
        for step in range(4):
            alone(latents(step))
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first["perplexity"], alone.perplexity())
