"""Closed standard streams."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import raises_one_line
from rich.console import Console

from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.commands.standard_streams import MessageStream, ReaderGone, ResultStream, tolerant_streams
from spinlock_fast.errors import OutputError


class Broken(io.StringIO):
    def __init__(self, number: int, terminal: bool = False) -> None:
        super().__init__()
        self.number, self.terminal, self.tries = number, terminal, 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise OSError(self.number, os.strerror(self.number))

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF])
def test_messages_to_a_closed_stream_are_dropped(number: int) -> None:
    stream = Broken(number)
    messages = MessageStream(stream)
    for _ in range(3):
        assert messages.write("text") == 4
        messages.flush()
    assert stream.tries == 1
    console = Console(file=messages, width=80)  # type: ignore[arg-type]
    console.print("text")


@pytest.mark.parametrize(("number", "terminal"), [(errno.EPIPE, False), (errno.EIO, True)])
def test_closed_standard_output_ends_the_command(number: int, terminal: bool) -> None:
    with pytest.raises(ReaderGone):
        ResultStream(Broken(number, terminal)).write("text")
    with pytest.raises(ReaderGone):
        Console(file=ResultStream(Broken(number, terminal)), width=80).print("text")  # type: ignore[arg-type]


def test_results_on_a_full_disk_are_an_output_error() -> None:
    with raises_one_line(OutputError, "standard output cannot be written: No space left"):
        ResultStream(Broken(errno.ENOSPC)).write("text")


def test_standard_streams_are_restored() -> None:
    before = sys.stdout, sys.stderr
    with tolerant_streams():
        assert isinstance(sys.stderr, MessageStream)
    assert (sys.stdout, sys.stderr) == before


def script(text: str, **options: object) -> subprocess.CompletedProcess[str]:
    start = "import sys\nfrom spinlock_fast.commands.exit_status import exit_with\n"
    text = f"{start}def command():\n    {text}\nexit_with(command)\n"
    return subprocess.run([sys.executable, "-c", text], text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_command_whose_pipe_is_closed_ends_with_141(size: int) -> None:
    read, write = os.pipe()
    os.close(read)
    done = script(f"print('x' * {size})", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [10, 10**6])
def test_a_command_whose_output_is_full_ends_with_4(size: int) -> None:
    with open("/dev/full", "w") as full:
        done = script(f"print('x' * {size})", stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 4
        assert done.stderr == "error: standard output cannot be written: No space left on device\n"
        # Messages are no result.
        assert script("sys.stderr.write('x'); print('y')", stdout=subprocess.PIPE, stderr=full).returncode == 0


@pytest.mark.parametrize("number", [0, 1, 2])
def test_closed_descriptor_is_not_reused(number: int, tmp_path: Path) -> None:
    text = (
        f"handle = open({str(tmp_path / 'file')!r}, 'w'); assert handle.fileno() > 2; "
        "print('result'); sys.stderr.write('message')"
    )
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = script(text, preexec_fn=lambda: os.close(number), **kept)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == ""


def test_text_that_the_terminal_cannot_show_is_one_line() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = script("print(chr(0x2297))", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 4
    assert done.stderr.startswith("error: standard output cannot show")


def test_a_command_that_succeeds_has_status_0() -> None:
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: None)
    assert ended.value.code == 0
