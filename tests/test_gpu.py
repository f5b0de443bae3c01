"""The way of `bench.gpu_check` on a CPU."""

import torch

from bench import gpu_check


def test_the_check_of_a_card_runs_on_a_cpu(capsys):
    """Every part that a CPU can run passes, and every other one is named with its reason."""
    assert gpu_check.main(["--tiny"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    verdicts = {line[: lines[0].index("verdict")].strip(): line.split() for line in lines[1:]}
    assert "nothing is measured" in head
    assert {name for name, words in verdicts.items() if "skipped" in words} == {
        "arms", "engine", "training, 96 tokens, fla", "training, 192 tokens, fla",
    }  # fmt: skip
    passed = {name for name, words in verdicts.items() if "pass" in words}
    assert passed == {
        "training, 96 tokens, no fla", "training, 192 tokens, no fla", "6 cone rows, the worst", "logprobs, vocabulary 40,000",
        "their gradients", "lift of 2 pairs, checkpointing", "steering, one chunk",
    }  # fmt: skip


def test_a_part_that_breaks_is_one_line_and_the_next_one_runs(monkeypatch, capsys):
    def broken(shapes):
        raise RuntimeError("CUDA error:\nout of everything")

    monkeypatch.setitem(gpu_check.PARTS, "cone", broken)
    assert gpu_check.main(["--tiny", "--only", "cone", "logprobs"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: CUDA error: out of everything" in out and "their gradients" in out
    assert gpu_check.main(["--tiny", "--only", "cone", "--minutes", "0"]) == 0
    assert "the 0 minutes were over" in capsys.readouterr().out


def test_without_a_card_the_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--tiny" in capsys.readouterr().err
