"""Every test runs in a folder of its own, where train() makes its `runs`."""

import pytest


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
