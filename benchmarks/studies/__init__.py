"""Studies of quality, which train many models."""
