import signal

import pytest

from spinlock_fast.commands.main import VERBS, command_of

ARGUMENTS = {
    "generate": ["--output", "x.h5"],
    "train": ["run.yaml"],
    "evaluate": ["ckpt", "x.h5"],
    "tokenize": ["ckpt", "x.h5", "--output", "tokens.h5"],
    "analyze": ["ckpt", "x.h5", "--output", "tables"],
    "convert": ["ckpt", "--output", "converted"],
    "report": ["ckpt", "--output", "pictures"],
}


@pytest.fixture(autouse=True)
def _sigterm_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_started_by_torchrun_is_refused(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        command_of(verb)(ARGUMENTS[verb])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: WORLD_SIZE is 2")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
