"""Files of an HTTP server, and processes that share their copies."""

from __future__ import annotations

import functools
import http.server
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
from processes import forkserver
from remote_shards import ROWS, SHARDS, assert_rows, copies, load, shard_bytes
from torch.utils.data import DataLoader

from spinlock_fast.data import HDF5Loader, remote_files, shard_index
from spinlock_fast.errors import DataError


class Server(http.server.SimpleHTTPRequestHandler):
    """Counts complete downloads; supports ranges unless `ranges` is False."""

    downloads: list[str] = []  # noqa: RUF012
    ranges = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        given = self.headers.get("Range")
        if given is None or not self.ranges:
            if self.path.endswith(".h5"):
                self.downloads.append(self.path)
                time.sleep(0.02)
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = (int(text) for text in given.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def server(local: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec's HTTP file system needs aiohttp")
    Server.downloads.clear()
    Server.ranges = True
    handler = functools.partial(Server, directory=str(local))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        shard_index._cache.clear()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()
    remote_files._remote_files.clear()


@pytest.mark.parametrize("ranges", [True, False])
def test_files_of_an_http_server(server: str, cache: Path, ranges: bool) -> None:
    Server.ranges = ranges
    loader = load(cache, f"{server}/s*.h5", shuffle=True, shard_group=2)
    assert copies(cache) == []
    with warnings.catch_warnings(action="ignore"):  # about the number of processors
        in_workers = DataLoader(loader, batch_size=None, num_workers=2)
    assert_rows(in_workers)
    assert_rows(loader)
    Server.downloads.clear()
    assert_rows(load(cache, [f"{server}/s{i}.h5" for i in range(SHARDS)]))
    assert Server.downloads == []


def test_http_errors_name_the_address(server: str, cache: Path) -> None:
    with helpers.raises_one_line(DataError, f"{server}/none.h5: no such file"):
        load(cache, f"{server}/none.h5?signature=secret")
    with helpers.raises_one_line(DataError, "http://127.0.0.1:9/a.h5", "cannot be read"):
        load(cache, "http://127.0.0.1:9/a.h5")


def read_epochs(url: str, cache: str, limit: int, seed: int, output: str) -> None:
    settings = {"shuffle": True, "shard_group": 1, "window_rows": 64, "batch_size": 40, "seed": seed}
    loader = HDF5Loader(f"{url}/s*.h5", "x", remote_cache_dir=cache, remote_cache_size=limit, **settings)
    rows = sum(len(batch["index"]) for _ in range(3) for batch in loader)
    Path(output).write_text(str(rows))


@pytest.mark.dist
@pytest.mark.parametrize("small", [False, True])
def test_processes_share_the_cache(server: str, cache: Path, local: Path, tmp_path: Path, small: bool) -> None:
    limit = (6 if small else SHARDS) * shard_bytes(local)
    outputs = [tmp_path / f"rows{seed}" for seed in range(2)]
    processes = [
        forkserver().Process(target=read_epochs, args=(server, str(cache), limit, seed, str(output)))
        for seed, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [output.read_text() for output in outputs] == [str(3 * SHARDS * ROWS)] * 2
    if small:
        assert len(Server.downloads) > SHARDS
    else:
        assert sorted(Server.downloads) == [f"/s{i}.h5" for i in range(SHARDS)]
