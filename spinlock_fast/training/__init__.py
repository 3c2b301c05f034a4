"""Training: the pipeline from a file to a checkpoint, the trainer, the loop and the step."""
