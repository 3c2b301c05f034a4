"""Files of remote stores (s3://, gs://, hf://, http://, ...), read from copies in a local cache directory.

A remote file is represented by the path of its copy; `fetch` downloads the copy when it is needed. The name of a copy
contains a hash of the address and the version of the remote file, so a changed file gets a new copy.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.data.file_cache import FileCache, Hold
from spinlock_fast.data.natural_sort import natural_sort_key
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import one_line, shown

DIRECTORY_VARIABLE = "SPINLOCK_FAST_REMOTE_CACHE"
SIZE_VARIABLE = "SPINLOCK_FAST_REMOTE_CACHE_SIZE"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# Fields of fsspec's file information that change with the contents, best first.
_CHECKSUMS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "Content-MD5", "Digest")
_TIMES = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "modified", "created")
_remote_files: dict[Path, RemoteFile] = {}  # files that this process has found, by the path of the copy


@dataclass(frozen=True)
class RemoteFile:
    """A file of a remote store.

    Args:
        url: its address.
        size: bytes.
        version: changes when the contents change.
        copy: path of the local copy.
        cache_bytes: size limit of the cache directory.
    """

    url: str
    size: int
    version: str
    copy: Path
    cache_bytes: int

    @property
    def name(self) -> str:
        """The address for messages."""
        return shown_url(self.url)

    def download(self, target: Path) -> None:
        """Copies the file; raises DataError if it is not the version that was found before."""
        store, path = _store(self.url)
        store.get_file(path, str(target))
        size = os.stat(target).st_size
        if size != self.size:
            raise OSError(f"{size} of {self.size} bytes arrived")
        store.invalidate_cache()
        if _version(_info(store, path, self.url)) != self.version:
            raise DataError(f"{self.name}: the file has changed since it was opened")

    def open(self) -> BinaryIO:
        """The remote file, for reading some parts of it."""
        store, path = _store(self.url)
        return cast(BinaryIO, store.open(path, "rb", block_size=1 << 20, cache_type="blockcache", size=self.size))


class RemoteCache:
    """Finds remote files, whose copies share a directory of limited size.

    Args:
        directory: the cache directory; by default SPINLOCK_FAST_REMOTE_CACHE, or a directory in the user's cache.
        max_bytes: size limit; by default SPINLOCK_FAST_REMOTE_CACHE_SIZE, or 20 GB. Copies that were not used for the
            longest time are removed.

    Raises:
        ConfigError: the variable is not a size.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int | None = None) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        default = os.environ.get(DIRECTORY_VARIABLE) or base / "spinlock-fast" / "remote"
        self.directory = Path(os.path.abspath(directory or default))
        try:
            given = os.environ.get(SIZE_VARIABLE) or "20GB"
            self.max_bytes = parse_bytes(given) if max_bytes is None else max_bytes
        except ValueError as error:
            raise ConfigError(f"{SIZE_VARIABLE}: {error}, got {shown(os.environ[SIZE_VARIABLE])}") from None

    def find(self, url: str) -> list[Path]:
        """Paths of the copies of the files that an address or a glob names; nothing is downloaded.

        Raises:
            ConfigError: a file is larger than the cache.
            DataError: no such file, the store cannot be reached, or a package is missing.
        """
        store, path = _store(url)
        if not re.search(r"[*\[]" if url.startswith(("http:", "https:")) else r"[*?\[]", url):
            return [self._add(url, _info(store, path, url))]
        found = _try(lambda: store.glob(path, detail=True), url)
        found = {name: info for name, info in found.items() if info.get("type") != "directory"}
        if not found:
            raise DataError(f"{shown_url(url)}: no file matches")
        copies = []
        for name in sorted(found, key=natural_sort_key):
            full = store.unstrip_protocol(name)
            # Lists of files may lack the size, and show times in another format.
            complete = found[name].get("size") and any(found[name].get(field) for field in _CHECKSUMS)
            copies.append(self._add(full, found[name] if complete else _info(store, name, full)))
        return copies

    def _add(self, url: str, info: dict[str, Any]) -> Path:
        if info.get("type") == "directory":
            raise DataError(f"{shown_url(url)}: is a directory; name the file, or a glob such as {url}/*.h5")
        size, version = info.get("size"), _version(info)
        if not isinstance(size, int):
            raise DataError(f"{shown_url(url)}: the server does not tell the size of the file")
        if size > self.max_bytes:
            raise ConfigError(f"remote_cache_size: {self.max_bytes} bytes do not hold {shown_url(url)} of {size} bytes")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", re.sub(r"[?#].*", "", url).rstrip("/").rpartition("/")[2])[-100:]
        key = hashlib.sha256(f"{url}\0{version}\0{size}".encode()).hexdigest()[:16]
        copy = self.directory / f"{key}-{name}"
        _remote_files[copy] = RemoteFile(url, size, version, copy, self.max_bytes)
        return copy


def is_remote(path: str) -> bool:
    """Whether a path is the address of a remote store."""
    match = _SCHEME.match(path)
    return match is not None and match[1] != "file" and not os.path.exists(path)


def remote_file(path: Path | int) -> RemoteFile | None:
    """The remote file whose copy has this path; None for other files."""
    return _remote_files.get(path) if isinstance(path, Path) else None


def version_number(file: RemoteFile) -> int:
    """A number that changes with the version of a remote file."""
    return zlib.crc32(f"{file.url}\0{file.version}".encode())


def fetch(path: Path, wait: bool = True) -> Hold | None:
    """Makes sure that the copy of a remote file exists; no effect for other files.

    Args:
        path: path of the copy.
        wait: if the cache is full of copies in use, wait for some time; otherwise download nothing.

    Returns:
        A hold on the copy, which is not removed from the cache until the hold is released; None for other files.

    Raises:
        ConfigError: the cache is too small.
        DataError: the file cannot be downloaded, or has changed.
        OutputError: the cache directory cannot be written.
    """
    if (file := remote_file(path)) is None:
        return None
    cache = FileCache(path.parent, file.cache_bytes)
    return cache.get(path, file.size, file.download, file.name, wait)


def remote_files(paths: Iterable[Path]) -> dict[Path, RemoteFile]:
    """The remote ones of some files, by the path of the copy."""
    return {path: _remote_files[path] for path in paths if path in _remote_files}


def register(files: dict[Path, RemoteFile]) -> None:
    """Adds remote files that another process has found."""
    _remote_files.update(files)


def shown_url(url: str) -> str:
    """An address for messages, without passwords and signatures."""
    return re.sub(r"(?<=://)[^/@]*@", "", re.sub(r"[?#].*", "", url))


def _store(url: str) -> tuple[Any, str]:
    """The file system of fsspec for an address, and the path within it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise DataError(f"{shown_url(url)}: remote files need fsspec: pip install 'spinlock-fast[remote]'") from None
    return cast(tuple[Any, str], _try(lambda: url_to_fs(url), url))


def _info(store: Any, path: str, url: str) -> dict[str, Any]:
    return cast(dict[str, Any], _try(lambda: store.info(path), url))


def _try(action: Any, url: str) -> Any:
    """Calls an action of a store; raises DataError for any of its errors, of which each package has its own."""
    try:
        return action()
    except ImportError as error:  # names the package of the store
        raise DataError(f"{shown_url(url)}: {one_line(error)}: install this package with pip") from None
    except FileNotFoundError as error:
        cause = error.__cause__  # of an HTTP address: the response, or why there is none
        if cause is not None and getattr(cause, "status", None) not in (404, 410):
            raise DataError(f"{shown_url(url)}: cannot be read: {one_line(cause)}") from None
        raise DataError(f"{shown_url(url)}: no such file") from None
    except Exception as error:
        raise DataError(f"{shown_url(url)}: cannot be read: {one_line(error) or type(error).__name__}") from error


def _version(info: dict[str, Any]) -> str:
    return next((f"{info[name]}".strip('"') for name in (*_CHECKSUMS, *_TIMES) if info.get(name)), "")
