"""The short form of `python -m bench.soak`, and that it can fail."""

import os

import pytest

from bench import soak


@pytest.mark.slow
def test_a_short_soak_holds():
    assert soak.soak(600, 2, 0) == []


def test_it_says_what_has_grown():
    state = soak.measured([os.getpid()])
    assert soak.grown(state, state) == []
    assert soak.grown(state, {**state, "files": state["files"] + 1, "trainer KiB": 1 << 30}) != []


@pytest.mark.slow
def test_a_wrong_verdict_is_a_violation(monkeypatch):
    monkeypatch.setitem(soak.HONEST, "sorts", ("def f(n): return n", lambda n: [n]))
    monkeypatch.setattr(soak, "HONEST", {"sorts": soak.HONEST["sorts"]})
    assert any("sorts: judged False" in text for text in soak.soak(20, 1, 0))
