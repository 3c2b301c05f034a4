"""Runs the tests of `vector_quantize_pytorch` with the classes of this package.

    python tests/dropin/upstream.py PATH_OF_THEIR_TESTS [--theirs | --corrected] [pytest arguments]

The test files are unchanged: their imports of `VectorQuantize`, `ResidualVQ` and `GroupedResidualVQ` get our classes.
`--theirs` keeps the original classes, to see which tests the installed version fails: newer tests cover behaviour that
our `corrections` change. `--corrected` enables all corrections.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import vector_quantize_pytorch

import spinlock_fast

REPLACED = ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ")


def corrected(original: type) -> type:
    class Corrected(original):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **{"corrections": "all", **named})

    return Corrected


def main(arguments: list[str]) -> int:
    options = {name for name in ("--theirs", "--corrected") if name in arguments}
    loaded = [module for name, module in sys.modules.items() if name.startswith("vector_quantize_pytorch.")]
    for name in REPLACED if "--theirs" not in options else ():
        ours = getattr(spinlock_fast, name)
        for module in (vector_quantize_pytorch, *loaded):
            if hasattr(module, name):
                setattr(module, name, corrected(ours) if "--corrected" in options else ours)
    rest = [argument for argument in arguments if argument not in options]
    return int(pytest.main(["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-W", "default", *rest]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
