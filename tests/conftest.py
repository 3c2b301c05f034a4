import os

# Two workers with two threads each on two cores are slower than one thread each; tests are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("plain", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("plain")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
