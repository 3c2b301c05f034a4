"""A new result replaces an earlier one atomically, also if the process is killed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import raises_one_line
from small_run_files import NAMES, contents, fill, publish

from spinlock_fast.checkpoints import run_directory
from spinlock_fast.checkpoints.integrity import MANIFEST, RESUME, read_manifest
from spinlock_fast.checkpoints.run_directory import (
    BEST,
    CONFIG,
    NEW,
    PARTIAL,
    PREVIOUS,
    TENSORBOARD,
    RunDirectory,
    check_integrity,
    find,
    unfinished,
)
from spinlock_fast.errors import DataError, OutputError


def test_first_result_is_published(tmp_path: Path) -> None:
    publish(tmp_path / "deep" / "out", "new")
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == sorted([*NAMES, MANIFEST, TENSORBOARD])


def test_earlier_results_are_archived_by_date(tmp_path: Path) -> None:
    fill(tmp_path, "first")
    os.utime(tmp_path / BEST, (1.6e9, 1.6e9))
    expected = contents(tmp_path)
    publish(tmp_path, "second")
    publish(tmp_path, "third")
    publish(tmp_path, "fourth")
    kept = sorted((tmp_path / PREVIOUS).iterdir())
    assert len(kept) == 3
    assert kept[0].name.startswith("2020-09-1")
    assert contents(kept[0]) == expected
    assert {(path / BEST).read_text().split()[0] for path in kept} == {"first", "second", "third"}
    assert (tmp_path / BEST).read_text() == f"fourth {BEST}"
    assert os.listdir(tmp_path / TENSORBOARD) == ["events.fourth"]


def fail(place: RunDirectory, with_state: bool) -> None:
    """A run that ends with an error, after its first state or before."""
    partial = place.begin(resumed=False)
    (partial / CONFIG).write_text("new")
    if with_state:
        (partial / RESUME).write_text("state")
    raise KeyError


@pytest.mark.parametrize("with_state", [True, False])
def test_failed_run_keeps_the_earlier_result(tmp_path: Path, with_state: bool) -> None:
    fill(tmp_path, "old")
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyError), RunDirectory(tmp_path) as place:
            fail(place, with_state)
        now = contents(tmp_path)
        assert {key: now[key] for key in before} == before
        assert unfinished(tmp_path) == with_state
    # The state of the first failed run is kept as well.
    assert len(list((tmp_path / PREVIOUS).iterdir()) if with_state else []) == int(with_state)
    assert (tmp_path / PARTIAL).exists() == with_state


def test_unused_directory_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunDirectory(tmp_path / "a" / "b") as place:
        fail(place, with_state=False)
    assert os.listdir(tmp_path) == []


def test_resumed_states_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    (tmp_path / RESUME).write_text("state")
    (tmp_path / CONFIG).write_text("old")
    (tmp_path / TENSORBOARD).mkdir()
    (tmp_path / TENSORBOARD / "events").write_text("old")
    other = tmp_path.with_name("other")
    shutil.copytree(tmp_path, other)
    publish(tmp_path, "new", resumed=True)
    assert not (tmp_path / RESUME).exists()
    publish(other, "new")  # another run: the unfinished one is not its own to end
    (aside,) = (other / PREVIOUS).iterdir()
    assert (aside / RESUME).read_text() == "state"


def test_foreign_subdirectories_are_rejected(tmp_path: Path) -> None:
    for name in (PARTIAL, NEW, PREVIOUS):
        (tmp_path / "out").mkdir()
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
        with raises_one_line(OutputError, name), RunDirectory(tmp_path / "out"):
            pass
        shutil.rmtree(tmp_path / "out")
    (tmp_path / "file").touch()
    with raises_one_line(OutputError, "file"), RunDirectory(tmp_path / "file"):
        pass
    with raises_one_line(OutputError, "cannot be written"), RunDirectory(Path("a\0b")):
        pass


def test_without_links_files_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    test_earlier_results_are_archived_by_date(tmp_path)


KILLED = textwrap.dedent("""
    import os, shutil, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    from small_run_files import contents, fill, publish
    from spinlock_fast.checkpoints.integrity import MANIFEST, RESUME
    from spinlock_fast.checkpoints.run_directory import (
        BEST, CONFIG, FINAL, METRICS, PARTIAL, PREVIOUS, RunDirectory, find, unfinished)

    root = Path({root!r})
    if {links}:
        names = ["rename", "replace", "link", "unlink", "rmdir", "mkdir"]
    else:
        names = ["rename", "replace", "unlink", "rmdir", "mkdir"]
        def no_link(*_, **__):
            raise PermissionError
        os.link = no_link

    def dies_at(count, after):
        for name in names:
            function = getattr(os, name)
            def counted(*arguments, function=function, **options):
                nonlocal count
                count -= 1
                if count == 0 and not after:
                    os._exit(9)
                found = function(*arguments, **options)
                if count == 0:
                    os._exit(9)
                return found
            setattr(os, name, counted)

    def child(action):
        pid = os.fork()
        if pid == 0:
            try:
                action()
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def whole(text):
        # What readers see is one result, all of it.
        for name in (BEST, FINAL, CONFIG, METRICS, MANIFEST):
            if name == MANIFEST:
                assert find(out, name).exists()
            else:
                assert find(out, name).read_text() == text + " " + name, (name, find(out, name).read_text())

    os.fsync = lambda descriptor: None  # a kill loses nothing that was written; only a power cut does
    kills = 0
    for after in (False, True):
        for count in range(1, 1000):
            out = root / f"{{after}}-{{count}}"
            fill(out, "old")
            old = contents(out)
            with RunDirectory(out) as place:
                fill(place.begin(False), "new")
                (place.partial / RESUME).write_text("state")
            def action():
                with RunDirectory(out) as place:
                    place.begin(True)
                    dies_at(count, after)
                    place.publish()
            status = child(action)
            if status == 0:
                break
            assert status == 9, status
            kills += 1
            committed = (out / ".new").exists() or not (out / PARTIAL).exists()
            whole("new" if committed else "old")
            if not committed:
                assert unfinished(out)
                assert {{k: v for k, v in contents(out).items()}} == old
            # A kill during the repair, at each of its steps, and then a repair that is not killed.
            def repair():
                dies_at(count // 2 + 1, after)
                with RunDirectory(out):
                    pass
            child(repair)
            whole("new" if committed else "old")
            with RunDirectory(out) as place:
                if not committed:
                    place.begin(True)
                    place.publish()
            whole("new")
            (aside,) = (out / PREVIOUS).iterdir()
            assert contents(aside) == old, (contents(aside), old)
            left = sorted(os.listdir(out))
            assert left == sorted([BEST, FINAL, CONFIG, METRICS, MANIFEST, "tensorboard", PREVIOUS]), left
    assert kills > 20, kills
    print(kills)
""")


@pytest.mark.parametrize("links", [True, False])
def test_kill_at_any_step_leaves_a_complete_result(tmp_path: Path, links: bool) -> None:
    script = KILLED.format(tests=str(Path(__file__).parents[1]), root=str(tmp_path), links=links)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_changed_file_is_detected(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    check_integrity(tmp_path, BEST)
    (tmp_path / BEST).write_text("older")
    with raises_one_line(DataError, BEST, "SHA-256"):
        check_integrity(tmp_path, BEST)
    (tmp_path / MANIFEST).unlink()
    check_integrity(tmp_path, BEST)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "damaged"), ("[]", "damaged"), ('{"format": 99}', "update spinlock-fast"), ("[" * 99999, "damaged")],
)
def test_invalid_manifest_is_rejected(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with raises_one_line(DataError, words):
        read_manifest(tmp_path / MANIFEST)


def test_result_replaced_while_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "old")
    hashed = run_directory.file_sha256
    calls = []

    def while_it_changes(path: Path) -> str:
        calls.append(path)
        if len(calls) == 1:
            publish(tmp_path, "new")
        return hashed(path)

    monkeypatch.setattr(run_directory, "file_sha256", while_it_changes)
    check_integrity(tmp_path, BEST)
    assert len(calls) == 2
    assert find(tmp_path, BEST).read_text() == f"new {BEST}"
