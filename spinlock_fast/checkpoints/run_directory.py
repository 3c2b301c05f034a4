"""The output directory of a run, which replaces an earlier result atomically once the run is complete.

    DIR/                 the finished result
    DIR/.partial/        the current run: configuration, resumable states, then its results
    DIR/.new/            a complete run while its files are moved to DIR, and those of the earlier result to `previous`
    DIR/previous/DATE/   earlier results; never deleted

Renaming `.partial` to `.new` publishes the run: before it the earlier result is valid, after it the new one. If a move
is interrupted, the next run completes it; until then `find` locates the files of the result.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from spinlock_fast.checkpoints.integrity import MANIFEST, STATES, expected_sha256, file_sha256, read_manifest
from spinlock_fast.errors import DataError, OutputError
from spinlock_fast.output.atomic_files import sync_directory, write_json
from spinlock_fast.output.locks import locked

BEST = "best_model.pt"
FINAL = "final_model.pt"
SAFETENSORS = "model.safetensors"
CONFIG = "config.yaml"
NORMALIZATION = "normalization_stats.npz"
HISTORY = "training_history.json"
METRICS = "metrics.json"
CARD = "README.md"
VOCABULARY = "vocabulary.json"  # of a run from another checkpoint: what changed in its vocabulary
REFERENCE = "reference_statistics.json"  # distributions of the run's rows, see `ReferenceStatistics`
TENSORBOARD = "tensorboard"
SCALARS = "scalars.csv"
WANDB = "wandb"
LOGS = (TENSORBOARD, SCALARS, WANDB)  # training curves, see `LoggingConfig`

FILES = (
    *(
        BEST,
        FINAL,
        *STATES,
        SAFETENSORS,
        CONFIG,
        NORMALIZATION,
        HISTORY,
        METRICS,
        VOCABULARY,
        REFERENCE,
        CARD,
        MANIFEST,
    ),
    *LOGS,
)

PARTIAL = ".partial"
NEW = ".new"
PREVIOUS = "previous"
_MOVES = "moves.json"  # in `.new`: the list of moves

log = logging.getLogger(__name__)


def find(directory: Path, name: str) -> Path:
    """Path of a file of the result in a directory, also if its publication was interrupted."""
    new = directory / NEW / name
    return new if os.path.exists(directory / NEW / _MOVES) and os.path.exists(new) else directory / name


def check_integrity(directory: Path, name: str) -> None:
    """Compares the SHA-256 of a file of a checkpoint directory with the manifest, if there is one.

    Raises:
        DataError: the file is damaged or was replaced, or the manifest cannot be read.
    """
    while True:
        manifest_path = find(directory, MANIFEST)
        manifest = read_manifest(manifest_path)
        expected = expected_sha256(manifest, name)
        path = find(directory, name)
        if expected is None or file_sha256(path) == expected:
            return
        if read_manifest(find(directory, MANIFEST)) == manifest:
            raise DataError(
                f"{path}: is damaged: its SHA-256 is not that of {manifest_path.name} "
                "(delete that file to use a model that was replaced on purpose)"
            )
        # Another run was published in the meantime: check again.


class RunDirectory:
    """A locked output directory; a context manager.

    Args:
        path: created if it does not exist, and removed on exit if it is empty.

    Raises:
        OutputError: another process holds the lock, or the directory cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path / PARTIAL
        self._created: list[Path] = []
        self._lock = ExitStack()
        self._resumed = False

    def __enter__(self) -> RunDirectory:
        try:
            self._created = [path for path in (self.path, *self.path.parents) if not os.path.exists(path)]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.path))
            for name in (PARTIAL, NEW, PREVIOUS):
                _check_subdirectory(self.path, self.path / name)
            self._finish_moves()
        except BaseException as error:
            self._release()
            if isinstance(error, (OSError, ValueError)):
                reason = getattr(error, "strerror", None) or error
                raise OutputError(f"{self.path}: cannot be written: {reason}") from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without a state there is nothing to resume.
        if os.path.isdir(self.partial) and not unfinished(self.path):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        self._lock.close()
        for path in self._created:
            with suppress(OSError, ValueError):
                path.rmdir()

    def begin(self, resumed: bool) -> Path:
        """Creates the directory `.partial` for the run and returns it.

        Args:
            resumed: continue the unfinished run there; otherwise it is moved to `previous`.

        Raises:
            OutputError: it cannot be created.
        """
        self._resumed = resumed
        try:
            if not resumed and os.path.isdir(self.partial):
                self._archive_unfinished()
            self.partial.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.partial}: cannot be written: {error.strerror}") from None
        return self.partial

    def publish(self) -> None:
        """Replaces the earlier result by the complete run in `.partial`; raises OutputError."""
        try:
            self._remove_temporary_files()
            published = sorted(path.name for path in self.partial.iterdir() if path.name not in (*STATES, _MOVES))
            archived, removed = self._replaced_files()
            previous = self._archive_name(self.path / archived[0]) if archived else ""
            moves = {"published": published, "previous": previous, "set_aside": archived, "removed": removed}
            write_json(self.partial / _MOVES, moves)
            sync_directory(self.partial)
            os.rename(self.partial, self.path / NEW)
            sync_directory(self.path)
            self._finish_moves()
        except OSError as error:
            raise OutputError(f"{self.path}: the result cannot be moved there: {error.strerror}") from None
        if archived:
            log.warning("%s held an earlier result: moved to %s", self.path, self.path / PREVIOUS / previous)

    def _replaced_files(self) -> tuple[list[str], list[str]]:
        """Names of files to move to `previous`, and of states to remove because this run has resumed them."""
        existing = [name for name in FILES if os.path.lexists(self.path / name)]
        consumed = [name for name in existing if name in STATES and self._resumed]
        if any(name in (BEST, FINAL, *STATES) and name not in consumed for name in existing):
            return [name for name in existing if name not in consumed], consumed
        # Without a model the files are overwritten; directories cannot be replaced by files.
        return [name for name in existing if (self.path / name).is_dir()], consumed

    def _finish_moves(self) -> None:
        """Completes a publication from any point at which it was interrupted."""
        new = self.path / NEW
        if not os.path.isdir(new):
            return
        try:
            moves = json.loads((new / _MOVES).read_bytes())
        except FileNotFoundError:
            # All files were moved: the list of moves is deleted last.
            new.rmdir()
            return
        except ValueError:
            raise OutputError(f"{new / _MOVES}: is damaged; move the files of {new} to {self.path} by hand") from None
        archive = self.path / PREVIOUS / moves["previous"]
        if moves["set_aside"]:
            archive.mkdir(parents=True, exist_ok=True)
        for name in moves["set_aside"]:
            _archive_file(self.path / name, archive / name, replaced=name in moves["published"])
        for name in moves["removed"]:
            (self.path / name).unlink(missing_ok=True)
        if moves["set_aside"]:
            sync_directory(archive)
        for name in moves["published"]:
            if os.path.exists(new / name):
                os.replace(new / name, self.path / name)
        for name in STATES:
            (new / name).unlink(missing_ok=True)
        sync_directory(self.path)
        (new / _MOVES).unlink()
        new.rmdir()
        sync_directory(self.path)

    def _remove_temporary_files(self) -> None:
        """Removes the temporary files of a killed writer."""
        for path in self.partial.glob(".*"):
            path.unlink()

    def _archive_unfinished(self) -> None:
        state = next((self.partial / name for name in (*STATES, FINAL) if os.path.exists(self.partial / name)), None)
        if state is None:  # killed before its first state
            shutil.rmtree(self.partial)
            return
        self._remove_temporary_files()
        archive = self.path / PREVIOUS / self._archive_name(state)
        archive.parent.mkdir(exist_ok=True)
        os.rename(self.partial, archive)
        log.warning("%s held an unfinished run: moved to %s", self.path, archive)

    def _archive_name(self, path: Path) -> str:
        """An unused name in `previous`: the date at which a file was written."""
        date = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(path.stat().st_mtime))
        name, count = date, 1
        while os.path.lexists(self.path / PREVIOUS / name):
            count += 1
            name = f"{date}-{count}"
        return name


def _archive_file(path: Path, target: Path, replaced: bool) -> None:
    """Moves a file to `target`, or links it there if a new file will replace it, so that `path` always exists."""
    if os.path.lexists(target) or not os.path.lexists(path):
        return
    if replaced and path.is_file():
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError:  # a file system without links
            pass
        else:
            return
    os.rename(path, target)


def _check_subdirectory(directory: Path, path: Path) -> None:
    """Raises OutputError if `path` exists and is not a directory on the same file system."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not os.path.isdir(path):
        raise OutputError(f"{path}: is not a directory of {directory}; move it away")
    if os.stat(path).st_dev != os.stat(directory).st_dev:
        raise OutputError(f"{path}: is on another file system than {directory}; move it away")


def unfinished(directory: Path) -> bool:
    """Whether a directory has an unfinished run that can be resumed, from a state or a final model."""
    return any(os.path.exists(directory / PARTIAL / name) for name in (*STATES, FINAL))


def can_resume(directory: Path) -> bool:
    """Whether a directory has an unfinished run, or a finished one that can be extended."""
    return unfinished(directory) or any(os.path.exists(find(directory, name)) for name in (*STATES, FINAL))


def run_to_resume(directory: Path) -> Path:
    """The output directory, given itself or its `.partial`."""
    return directory.parent if directory.name == PARTIAL else directory


def config_to_resume(directory: Path) -> Path:
    """Path of the settings of the run that --resume continues."""
    path = directory / PARTIAL / CONFIG
    return path if unfinished(directory) and os.path.exists(path) else find(directory, CONFIG)
