"""The categorical hierarchical VQ-VAE: layers, losses, initialisation and metrics."""
