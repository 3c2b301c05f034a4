"""Ablations: variants of one configuration, trained with paired seeds, and their statistics."""
