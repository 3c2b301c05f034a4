"""Trajectories of a tile of operators in blocks of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.initial_conditions import initial_field
from spinlock_fast.simulate.noise import BLOCK_STEPS, NoiseSource, Purpose, generator
from spinlock_fast.simulate.operators import OperatorTile
from spinlock_fast.simulate.parameters import Theta
from spinlock_fast.simulate.single_operator import SingleOperator

# Operators per tile. One on the CPU: its fields fit the cache, and nothing is padded.
TILE = {"cpu": 1, "cuda": 32}


class Rollout:
    """T steps of M realizations of the operators of a tile.

    residual: v = u + s f(u), u <- v / sqrt(1 + 2 c s v^2) + noise; convex: u <- (1 - s) u + s f(u) + noise;
    then clipped to +/- `clip`. The square root is the exact flow over time s of the confinement du/dt = -c u^3 (the
    restoring term of the Ginzburg-Landau equation, by Lie splitting), which bounds residual operators.

    Args:
        thetas: the operators, O of them.
        config: settings of the data set.
        device: device of the simulation.
    """

    def __init__(self, thetas: Sequence[Theta], config: GeneratorConfig, device: torch.device) -> None:
        self._config, self._thetas = config, thetas
        seed, grid = config.random_seed, config.grid_size
        self._native = SingleOperator.supports(thetas, device)
        self._tile: OperatorTile | SingleOperator = (
            SingleOperator(thetas[0], seed, config.gain)
            if self._native
            else OperatorTile(thetas, seed, config.gain, device)
        )
        mask_shape = (self._tile.hidden_layers, self._tile.channels)
        self._noise = NoiseSource(thetas, seed, config.num_realizations, grid, config.num_timesteps, mask_shape, device)
        fields = [initial_field(t.initial_condition, grid, generator(seed, Purpose.INITIAL, t.index)) for t in thetas]
        self.initial = torch.stack([torch.from_numpy(field) for field in fields]).to(device)  # [O, 3, G, G]
        shape = (1, len(thetas), 1, 1, 1)
        self._step = torch.tensor([t.step_size for t in thetas], device=device).view(shape)
        residual = torch.tensor([t.update_policy == "residual" for t in thetas], device=device).view(shape)
        # Both updates are v / sqrt(1 + cubic v^2) with v = keep u + s f(u).
        self._keep = torch.where(residual, 1.0, 1.0 - self._step)
        self._cubic = torch.where(residual, 2.0 * config.confinement * self._step, 0.0)
        if self._native:
            self._factors = [float(factor) for factor in (self._keep, self._step, self._cubic)]

    def step(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """One step without noise: [M, O, 3, G, G] -> the same shape."""
        v = torch.addcmul(self._keep * u, self._step, self._tile(u, mask))
        return v.square().mul_(self._cubic).add_(1.0).rsqrt_().mul_(v)

    def blocks(self) -> Iterator[Tensor]:
        """States u_1 .. u_T as blocks [S, M, O, 3, G, G] of at most BLOCK_STEPS steps, in order."""
        config = self._config
        u = self.initial.expand(config.num_realizations, *self.initial.shape)
        for index in range(-(-config.num_timesteps // BLOCK_STEPS)):
            noise, masks = self._noise.block(index)
            states = torch.empty_like(noise)
            for t in range(len(noise)):
                if self._native:
                    self._native_step(u, masks[t], noise[t], states[t])
                else:
                    torch.add(self.step(u, masks[t]), noise[t], out=states[t]).clamp_(-config.clip, config.clip)
                u = states[t]
            yield states

    def _native_step(self, u: Tensor, mask: Tensor, noise: Tensor, out: Tensor) -> None:
        """One step of a single operator with noise into `out`: the operations of `step` in one pass over the state."""
        f, u = self._tile(u, mask), u.contiguous()
        keep, step, cubic = self._factors
        library.confined_step(
            address(u), address(f), address(noise), u.numel(), keep, step, cubic, self._config.clip, address(out)
        )
