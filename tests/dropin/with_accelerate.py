"""Trains autoencoders with accelerate: `accelerate launch ... with_accelerate.py DIRECTORY`, for test_accelerate.py.

Writes the state of each kind after 20 steps to DIRECTORY/KIND.pt.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from autoencoder import WIDTH, batch, make, optimizer_of, state_of
from torch.utils.data import DataLoader, TensorDataset

STEPS, KINDS = 20, ("averages", "learned", "orthogonal", "stages", "packed", "original", "shared", "stages, resets")


def prepared(accelerator: Accelerator, kind: str, per_process: int) -> tuple:
    module = make(kind)
    rows = torch.cat([batch(step) for step in range(STEPS)])
    loader = DataLoader(TensorDataset(rows), batch_size=per_process)
    return accelerator.prepare(module, optimizer_of(module), loader)


def train(accelerator: Accelerator, module, optimizer, loader, steps: range) -> None:
    """Steps of an epoch, as its part `steps`."""
    for step, (x,) in enumerate(loader):
        if step in steps:
            with accelerator.accumulate(module):
                accelerator.backward(module(x))
                optimizer.step()
                optimizer.zero_grad()


def main(directory: Path) -> None:
    accelerator = Accelerator(cpu=True)
    per_process = len(batch(0)) // accelerator.num_processes
    for kind in KINDS:
        set_seed(0, device_specific=True)
        module, optimizer, loader = prepared(accelerator, kind, per_process)
        train(accelerator, module, optimizer, loader, range(10))
        accelerator.save_state(str(directory / "half"))
        train(accelerator, module, optimizer, loader, range(10, STEPS))
        state = state_of(accelerator.unwrap_model(module))
        accelerator.free_memory()
        # The second half again, from the checkpoint.
        module, optimizer, loader = prepared(accelerator, kind, per_process)
        accelerator.load_state(str(directory / "half"))
        train(accelerator, module, optimizer, loader, range(10, STEPS))
        for name, value in state_of(accelerator.unwrap_model(module)).items():
            assert name.endswith("usage") or torch.equal(value, state[name]), f"{kind}: {name}"
            everywhere = accelerator.gather(value[None].contiguous())
            assert all(torch.equal(one, value) for one in everywhere), f"{kind}: {name} differs between processes"
        # The prepared loader repeats rows at the end of an epoch, so that all processes have batches of one size.
        odd = accelerator.prepare(DataLoader(TensorDataset(torch.randn(31, 2, WIDTH)), batch_size=4))
        train(accelerator, module, optimizer, odd, range(10))
        if accelerator.is_main_process:
            torch.save(state, directory / f"{kind}.pt")
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
