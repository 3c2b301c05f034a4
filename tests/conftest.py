import gc
import importlib.util
import logging
import os
from collections.abc import Iterator

# One thread per test process: tests are small, and `make test` runs one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, kernels run under Triton's interpreter. The variable is read when a kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

torch.set_num_threads(1)
gc.disable()  # until tests are collected: imports make no garbage, and searching for it is a third of their time
settings.register_profile("plain", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("plain")


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.prepare()


@pytest.fixture(scope="session", autouse=True)
def _without_flushes() -> Iterator[None]:
    """Flushes to disk take a part of the time, and no test loses power. Processes that tests start do flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """Benchmarks set the level of the package's logger, which would hide messages from later tests."""
    logger = logging.getLogger("spinlock_fast")
    level = logger.level
    yield
    logger.setLevel(level)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is not searched again during the tests
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton's bindings report leaks when the process ends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
