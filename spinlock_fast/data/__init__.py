"""Reading data sets."""
