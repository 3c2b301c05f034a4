"""Projection of embeddings to latents: normalisation, ragged linear layers, dropout and normalisation per codebook."""

from spinlock_fast.kernels.latent_projection.op import normalize_, project, ragged_layer_norm, scaled_output_linear

__all__ = ["normalize_", "project", "ragged_layer_norm", "scaled_output_linear"]
