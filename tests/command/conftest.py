"""Fixtures of the tests of the command."""

import pytest
import torch

from fastelbo.commands import pictures


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of the time of a small run. Children are forked: what is changed here is changed there."""
    monkeypatch.setattr(pictures, "save_all", lambda *_, **__: [])


@pytest.fixture
def one_thread():
    """Steps of a millisecond: on a busy machine, threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
