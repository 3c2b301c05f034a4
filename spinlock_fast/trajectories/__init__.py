"""Simulated trajectories in the layouts that people store: The Well, PDEBench, py-pde, plain arrays."""

from spinlock_fast.trajectories.layouts import LAYOUTS, open_trajectories
from spinlock_fast.trajectories.samples import TrajectorySet

__all__ = ["LAYOUTS", "TrajectorySet", "open_trajectories"]
