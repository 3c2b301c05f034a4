"""One writer per output; a lock ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import raises_one_line

from spinlock_fast.checkpoints.run_directory import RunDirectory
from spinlock_fast.errors import OutputError
from spinlock_fast.generate import main as generate_main
from spinlock_fast.output.locks import lock_path, locked, locked_output_directory, locked_output_file
from spinlock_fast.train import main as train_main

HOLDER = """
import sys, time
from pathlib import Path
from spinlock_fast.output.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_second_writer_error_names_the_first(tmp_path: Path, kind: str) -> None:
    output = tmp_path if kind == "directory" else tmp_path / "data.h5"
    with holder(output) as process:
        words = f"{output}: is being written by process {process.pid} on {os.uname().nodename}, since 2"
        with raises_one_line(OutputError, words), locked(output):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock_path(output).exists()  # a killed process leaves the file but not the lock
        with locked(output):
            pass
    assert os.listdir(tmp_path) == []


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def second() -> None:
        try:
            with locked(tmp_path):
                pass
        except OutputError as error:
            refused.append(error)

    with locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert str(os.getpid()) in str(refused[0])


def test_writers_hold_the_lock_one_at_a_time(tmp_path: Path) -> None:
    """The lock file is removed and recreated while others wait: never two holders at once."""
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        for _ in range(200):
            try:
                with locked(tmp_path):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                        done += 1
                    with guard:
                        inside -= 1
            except OutputError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert done > 200


def test_without_file_system_locks_the_stored_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    monkeypatch.setattr("spinlock_fast.output.locks._WAIT_SECONDS", 0.0)
    host = os.uname().nodename
    lock_path(tmp_path).write_text(f"{os.getppid()} {host} 2026-01-01 00:00:00")
    with raises_one_line(OutputError, f"process {os.getppid()}"), locked(tmp_path):
        pass
    lock_path(tmp_path).write_text("1 another-host 2026-01-01 00:00:00")
    with raises_one_line(OutputError, "another-host"), locked(tmp_path):
        pass
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock_path(tmp_path).write_text(f"{gone.pid} {host} 2026-01-01 00:00:00")
    with locked(tmp_path), raises_one_line(OutputError, str(os.getpid())), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_lock_file_does_not_follow_symbolic_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    lock_path(tmp_path).symlink_to(victim)
    with raises_one_line(OutputError, "cannot be written"), locked(tmp_path):
        pass
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_second_command_on_an_output_is_an_error(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    if verb == "train":
        (tmp_path / "run.yaml").write_text("dataset_path: none.h5\n")
        output.mkdir()
        arguments = [str(tmp_path / "run.yaml"), "--quiet", "--output", str(output)]
    else:
        arguments = ["--operators", "1", "--output", str(output), "--overwrite"]
    main = train_main if verb == "train" else generate_main
    with locked(output), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 4
    text = capsys.readouterr().err
    assert text.startswith(f"error: {output}: is being written by process {os.getpid()} on ")
    assert text.count("\n") == 1


def test_run_locks_its_directory(tmp_path: Path) -> None:
    with RunDirectory(tmp_path), raises_one_line(OutputError, "is being written"), RunDirectory(tmp_path):
        pass


def test_device_is_not_locked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with locked_output_file(tmp_path / "pipe"), locked_output_file(tmp_path / "pipe"):
        assert os.listdir(tmp_path) == ["pipe"]


def test_output_directory_has_one_writer(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    first, second = locked_output_directory(output), locked_output_directory(output)
    with first, raises_one_line(OutputError, "is being written"), second:
        pass
    assert os.listdir(output) == []
    (tmp_path / "file").touch()
    with raises_one_line(OutputError, "file"), locked_output_directory(tmp_path / "file"):
        pass


def test_a_pipe_is_not_locked() -> None:
    reading, writing = os.pipe()
    try:
        with locked_output_file(Path(f"/dev/fd/{writing}")), locked_output_file(Path(f"/dev/fd/{writing}")):
            pass
    finally:
        os.close(reading)
        os.close(writing)
