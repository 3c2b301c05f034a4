"""Shared by all operators: argument checks, streams, cached tables, layouts, higher-order derivatives."""
