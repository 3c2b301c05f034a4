"""What all operators share: checks of their arguments, the current device, derivatives of higher order."""
