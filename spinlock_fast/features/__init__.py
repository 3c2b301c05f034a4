"""From raw feature families to the matrix that the model sees."""
