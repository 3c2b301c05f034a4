"""Trains autoencoders with Lightning: `with_lightning.py STRATEGY DIRECTORY`, for test_lightning.py.

Lightning starts the second process. Writes the state of each kind after two epochs to DIRECTORY/KIND.pt.
"""

import sys
from pathlib import Path

import lightning
import torch
from autoencoder import KINDS, batch, make, optimizer_of, state_of
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

STEPS, PROCESSES = 10, 2  # steps of an epoch
TRAINED = ("averages", "learned", "orthogonal", "stages", "shared", "packed", "original", "stages, resets")


class Module(lightning.LightningModule):
    """An autoencoder."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.autoencoder = make(kind)

    def training_step(self, rows):
        return self.autoencoder(rows[0])

    def validation_step(self, rows):
        self.log("error", self.autoencoder(rows[0]), sync_dist=True)

    def train_dataloader(self):
        # In order: the sampler that Lightning adds shuffles the rows.
        data = TensorDataset(torch.cat([batch(step) for step in range(STEPS)]))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, len(batch(0)) // PROCESSES, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(batch(99)), 8)

    def configure_optimizers(self):
        return optimizer_of(self)


def trainer(strategy: str, directory: Path, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=strategy,
        max_epochs=epochs,
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        use_distributed_sampler=False,
    )


def main(strategy: str, directory: Path) -> None:
    for kind in TRAINED:
        lightning.seed_everything(0, verbose=False)
        whole = Module(kind)
        run = trainer(strategy, directory, 2)
        run.fit(whole)
        half = trainer(strategy, directory, 1)
        half.fit(Module(kind))
        half.save_checkpoint(directory / "half.ckpt")
        resumed = Module(kind)
        trainer(strategy, directory, 2).fit(resumed, ckpt_path=directory / "half.ckpt")
        loaded = Module.load_from_checkpoint(directory / "half.ckpt")
        assert int(resumed.trainer.global_step) == 2 * STEPS
        assert loaded.hparams.kind == kind
        for name, value in state_of(whole.autoencoder).items():
            others = run.strategy.all_gather(value)
            assert all(torch.equal(other, value) for other in others), f"{kind}: {name} differs between processes"
            if kind in KINDS and not name.endswith("usage"):
                torch.testing.assert_close(state_of(resumed.autoencoder)[name], value)
        if run.is_global_zero:
            torch.save(state_of(whole.autoencoder), directory / f"{kind}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
