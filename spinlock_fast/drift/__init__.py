"""Whether rows are still those that the vocabulary of a checkpoint was made for."""
