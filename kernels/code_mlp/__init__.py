"""A two-layer network of the code vectors of all codebooks, its first layer evaluated once per code, not per row."""
