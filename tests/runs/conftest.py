"""Fixtures that the tests of whole runs share."""

import threading

import pytest
from harness import run
from tqdm import tqdm

# tqdm's own lock is shared with forked children, and one that is killed while it draws would never release it
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that could hold the lock during a fork


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Runs a loaded script that must exit with one sentence on a line of its own; returns the sentence."""

    def refused(module, argv, code=2):
        with pytest.raises(SystemExit) as stop:
            run(module, monkeypatch, tmp_path, argv)
        assert stop.value.code == code
        message = capsys.readouterr().err
        assert "Traceback" not in message
        (sentence,) = [line for line in message.splitlines() if "error: " in line]
        assert sentence.startswith("error: ")
        return sentence

    return refused
