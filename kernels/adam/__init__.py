"""Adam for all parameters of a model in one launch."""
