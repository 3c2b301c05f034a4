"""A convolutional surrogate of the Kuramoto-Sivashinsky equation, trained with and without a loss on its behaviour.

    pip install py-pde
    python examples/behaviour_loss.py simulate --output data/waves
    python -m spinlock_fast.extract data/waves/train.npy --axes "n t c y x" --output data/waves/features.h5
    python -m spinlock_fast.train configs/trajectories.yaml --set dataset_path=data/waves/features.h5 \\
        --output checkpoints/waves
    python examples/behaviour_loss.py train data/waves checkpoints/waves

`simulate` solves the equation with random parameters, in 120 simulations for training and 32 for the test. `train`
first fits one step of the surrogate, and goes on from there with whole rollouts: once with their mean squared error
alone, and once with the behaviour loss added. The table has both measures on the test simulations.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spinlock_fast import BehaviourLoss, Tokenizer

SIDE, STATES, INTERVAL, FIRST = 32, 25, 1.0, 10.0
BATCH = 8


def simulate(output: Path, train: int, test: int, seed: int) -> None:
    """Writes OUTPUT/{train,test}.npy, fields [N, T, 1, Y, X], and the parameter nu [N] of each to *_nu.npy."""
    import pde

    rng = np.random.default_rng(seed)
    grid = pde.UnitGrid([SIDE, SIDE], periodic=True)
    output.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        fields, parameters = [], rng.uniform(0.8, 1.2, count)
        for i, nu in enumerate(parameters):
            states = pde.MemoryStorage()
            start = pde.ScalarField(grid, rng.uniform(-0.5, 0.5, (SIDE, SIDE)))
            equation, end = pde.KuramotoSivashinskyPDE(nu), FIRST + INTERVAL * (STATES - 1)
            tracker = states.tracker(INTERVAL)
            last = equation.solve(start, t_range=FIRST, dt=0.02, tracker=None, backend="numpy")
            equation.solve(last, t_range=(FIRST, end), dt=0.02, tracker=[tracker], backend="numpy")
            trajectory = np.stack([state.data for state in states])[:STATES]
            fields.append(trajectory - trajectory.mean((1, 2), keepdims=True))  # the mean grows without an effect
            if (i + 1) % 20 == 0:
                print(f"{name}: {i + 1} of {count} simulations", flush=True)
        np.save(output / f"{name}.npy", np.stack(fields)[:, :, None].astype(np.float32))
        np.save(output / f"{name}_nu.npy", parameters.astype(np.float32))


class Surrogate(nn.Module):
    """u(t) [N, 1, Y, X] and nu [N] -> u(t + 1)."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 5, padding=2, padding_mode="circular")

        self.layers = nn.Sequential(
            layer(2, channels), nn.GELU(), layer(channels, channels), nn.GELU(), layer(channels, 1)
        )

    def forward(self, u: Tensor, nu: Tensor) -> Tensor:
        """One time step."""
        parameter = nu.view(-1, 1, 1, 1).expand_as(u)
        change: Tensor = self.layers(torch.cat([u, parameter], 1))
        change = u + change
        return change - change.mean((2, 3), keepdim=True)

    def rollout(self, start: Tensor, nu: Tensor, states: int) -> Tensor:
        """[N, T, 1, Y, X], the first state given."""
        found = [start]
        for _ in range(states - 1):
            found.append(self(found[-1], nu))
        return torch.stack(found, 1)


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Random batches of trajectory numbers."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    yield from order.split(BATCH)


def fit_steps(model: Surrogate, fields: Tensor, nu: Tensor, epochs: int) -> None:
    """Mean squared error of single steps."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    variance = fields.var()
    for epoch in range(epochs):
        for rows in batches(len(fields), epoch):
            u = fields[rows]
            now, then = u[:, :-1].flatten(0, 1), u[:, 1:].flatten(0, 1)
            error = (model(now, nu[rows].repeat_interleave(u.shape[1] - 1)) - then).square().mean() / variance
            optimizer.zero_grad()
            error.backward()
            optimizer.step()


def fit_rollouts(
    model: Surrogate, fields: Tensor, nu: Tensor, epochs: int, behaviour: BehaviourLoss | None, weight: float
) -> None:
    """Mean squared error of whole rollouts over the variance, plus the weighted behaviour loss."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    variance = fields.var()
    for epoch in range(epochs):
        for rows in batches(len(fields), epoch):
            u = fields[rows]
            predicted = model.rollout(u[:, 0], nu[rows], u.shape[1])
            loss = (predicted - u).square().mean() / variance
            if behaviour is not None:
                loss = loss + weight * behaviour(predicted, u)["total"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        scheduler.step()


@torch.no_grad()
def measure(model: Surrogate, fields: Tensor, nu: Tensor, behaviour: BehaviourLoss) -> dict[str, float]:
    """Both measures on whole rollouts."""
    predicted = model.rollout(fields[:, 0], nu, fields.shape[1])
    terms = behaviour(predicted, fields)
    same = behaviour.encode(predicted).tokens == behaviour.encode(fields).tokens
    return {
        "MSE / variance": float((predicted - fields).square().mean() / fields.var()),
        "amplitude": float(predicted.std() / fields.std()),
        **{name: float(terms[name]) for name in ("latent", "tokens", "commitment", "reconstruction")},
        "equal tokens": float(same.float().mean()),
    }


def train(data: Path, checkpoint: Path, epochs: int, weight: float, seed: int) -> dict[str, dict[str, float]]:
    """Trains both surrogates and prints the table."""
    train_fields, train_nu, test_fields, test_nu = (
        torch.from_numpy(np.load(data / f"{name}.npy")) for name in ("train", "train_nu", "test", "test_nu")
    )
    behaviour = BehaviourLoss(Tokenizer.from_checkpoint(checkpoint))
    torch.manual_seed(seed)
    model = Surrogate()
    fit_steps(model, train_fields, train_nu, epochs)
    results = {"single steps": measure(model, test_fields, test_nu, behaviour)}
    for name, loss in (("rollouts, MSE", None), ("rollouts, MSE + behaviour", behaviour)):
        started, own = time.perf_counter(), copy.deepcopy(model)
        fit_rollouts(own, train_fields, train_nu, epochs, loss, weight)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        results[name] = measure(own, test_fields, test_nu, behaviour)
    print(f"{'trained with':28}" + "".join(f"{column:>16}" for column in results["single steps"]))
    for name, found in results.items():
        print(f"{name:28}" + "".join(f"{value:16.3f}" for value in found.values()))
    return results


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("simulate", help="write the simulations (needs py-pde)")
    making.add_argument("--output", type=Path, required=True)
    making.add_argument("--train", type=int, default=120, help="simulations for training (120)")
    making.add_argument("--test", type=int, default=32, help="simulations for the test (32)")
    making.add_argument("--seed", type=int, default=0)
    training = verbs.add_parser("train", help="train the surrogates and print the table")
    training.add_argument("data", type=Path, help="the directory that `simulate` wrote")
    training.add_argument("checkpoint", type=Path)
    training.add_argument("--epochs", type=int, default=12, help="of single steps, and of rollouts (12)")
    training.add_argument("--weight", type=float, default=0.3, help="of the behaviour loss (0.3)")
    training.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    if chosen.verb == "simulate":
        simulate(chosen.output, chosen.train, chosen.test, chosen.seed)
    else:
        train(chosen.data, chosen.checkpoint, chosen.epochs, chosen.weight, chosen.seed)


if __name__ == "__main__":
    main()
