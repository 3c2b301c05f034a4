"""SIGINT at random moments while a loader opens files, reads or closes: the caller always gets KeyboardInterrupt."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hdf5_layouts import NOT_NATIVE
from processes import run_code

INTERRUPTS = 100

# Each round sends one SIGINT while the loader is in use, and waits for its KeyboardInterrupt.
CODE = """
import json, os, queue, random, signal, sys, threading, time
from spinlock_fast.data import HDF5Loader, shard_index

path, shuffle, use, count = sys.argv[1], sys.argv[2] == "True", sys.argv[3], int(sys.argv[4])
delays, sent, handled, ignored = queue.SimpleQueue(), threading.Event(), [0], []
sys.unraisablehook = lambda what: ignored.append(f"{what.exc_type.__name__} in {what.object!r}")

def interrupt(number, frame):
    handled[0] += 1
    raise KeyboardInterrupt

def send():
    while True:
        time.sleep(delays.get())
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

def read():
    if use == "open":
        shard_index._cache.clear()
        HDF5Loader(path, "x")
        return
    for batch in loader:
        if use == "leave":
            break

signal.signal(signal.SIGINT, interrupt)
threading.Thread(target=send, daemon=True).start()
loader = HDF5Loader(path, "x", batch_size=16, window_rows=64, shuffle=shuffle, num_threads=2)
random.seed(0)
caught = 0
for _ in range(count):
    sent.clear()
    before = handled[0]
    try:
        delays.put(random.uniform(0.0, 0.02))
        while not sent.is_set():
            read()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and handled[0] == before:
            time.sleep(0.001)
        time.sleep(0.02)  # a signal that was ignored once is sent again
    except KeyboardInterrupt:
        caught += 1
rows = sorted(int(row) for batch in loader for row in batch["index"])
print(json.dumps([caught, ignored, rows == list(range(loader.rows))]))
"""


def interrupted(tmp_path: Path, layout: str, shuffle: bool, use: str, count: int) -> tuple[int, list[str], bool]:
    """Number of interrupts that reached the caller, exceptions that Python ignored, whether the loader works after."""
    file = tmp_path / "a.h5"
    storage = {"chunks": (4, 1000), **(NOT_NATIVE if layout == "h5py" else {"compression": "gzip"})}
    if layout == "contiguous":
        storage = {}
    with h5py.File(file, "w") as handle:
        handle.create_dataset("x", data=np.arange(256_000, dtype="f4").reshape(256, 1000), **storage)
    output = run_code(CODE, [str(file), str(shuffle), use, str(count)], tmp_path)
    caught, ignored, complete = json.loads(output.splitlines()[-1])
    return caught, ignored, complete


@pytest.mark.parametrize("layout", ["h5py", "native"])
def test_some_interrupts_reach_the_caller(tmp_path: Path, layout: str) -> None:
    assert interrupted(tmp_path, layout, True, "leave", 10) == (10, [], True)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["complete", "leave", "open"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("layout", ["h5py", "native", "contiguous"])
def test_no_interrupt_is_lost(tmp_path: Path, layout: str, shuffle: bool, use: str) -> None:
    assert interrupted(tmp_path, layout, shuffle, use, INTERRUPTS) == (INTERRUPTS, [], True)
