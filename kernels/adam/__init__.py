"""The update of all parameters by Adam, in one launch."""
