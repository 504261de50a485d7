"""Fixtures that the tests of whole runs share."""

import threading

import fault_envs
import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

# tqdm's own lock is shared with forked children, and one that is killed while it draws would never release it
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that could hold the lock during a fork


@pytest.fixture(autouse=True)
def a_folder_of_its_own(monkeypatch, tmp_path):
    """Runs land in tmp_path, in one thread, and none may leave an environment open, however it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    # logs of one second are read in the order of their numbers as text, so none may reach 10
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    yield
    torch.set_num_threads(1)
    left, _ = len(fault_envs.OPEN), fault_envs.OPEN.clear()
    assert not left, f"{left} environments are open"


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Starts an entry that must end with one sentence on stderr; returns the sentence."""

    def refused(entry, *argv, code=2):
        assert entry.main(monkeypatch, *argv) == code
        message = capsys.readouterr().err
        assert "Traceback" not in message
        (sentence,) = [line for line in message.splitlines() if "error: " in line]
        assert sentence.startswith("error: ")
        return sentence

    return refused
