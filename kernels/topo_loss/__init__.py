"""Topographic term: correlations between the distances of features, of latents and of codes, with their gradient."""

from spinlock_fast.kernels.topo_loss.op import topographic_correlations, topographic_loss

__all__ = ["topographic_correlations", "topographic_loss"]
