"""Fixtures: a real tiny model with a real adapter, the embedded pocket model, and one small run that many tests look at."""

import signal

import hypothesis
import pytest
import torch

from engine import model as lm
from harness.config import POCKET

lm.mend_vllm_environment()
from support.models import adapted_qwen3, tiny_qwen3
from support.runs import UNDISTURBED, grpo

torch.set_num_threads(1)
hypothesis.settings.register_profile("here", deadline=None)  # a loaded machine is no defect
hypothesis.settings.load_profile("here")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores it, and so would every run that tests start


@pytest.fixture
def base():
    return tiny_qwen3()


@pytest.fixture
def model():
    return adapted_qwen3()


@pytest.fixture(scope="session")
def pocket_tokenizer():
    return lm.load_tokenizer(str(POCKET))


@pytest.fixture
def pocket():
    return lm.load_model(str(POCKET))


@pytest.fixture(scope="session")
def heldout(tmp_path_factory):
    """A short held-out file: the evaluation is the longest part of a small run."""
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    path.write_text("".join((POCKET / "heldout.jsonl").read_text().splitlines(keepends=True)[:20]))
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, heldout):
    """(folder, output) of a whole small run of the arm `cone`."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, grpo(*UNDISTURBED, "--heldout", heldout, "--out", folder)
