"""Training steps, epochs, the pipeline and the whole training command."""
