"""The environment in a process of its own: it says what the environment says, and ends with its trainer."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread

import pytest
from support.problems import CANONICAL, row, write
from support.processes import descendants_named, workers_of

from faults.errors import UserError
from harness.config import ROOT
from harness.grader import Grader, _obey
from leetcode_env import LeetCodeEnv, load_problems
from loopholes import LOOPHOLES, Told, evaluated_by
from sandbox.pool import SandboxDied

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
WRONG = CANONICAL.replace("return", "return -1 or")
CODES = [
    CANONICAL, WRONG, f"{WRONG}\n\ndef run_tests():\n    pass", f"{WRONG}\n\ndef run_tests():\n    assert False", "def", "exit()",
    f"{CANONICAL}\n\ndef run_tests():\n    print('fine')",
]  # fmt: skip
TEXTS = ["no code at all", *(f"```python\n{code}\n```" for code in CODES)]


@pytest.fixture
def problems(tmp_path):
    return load_problems(write(tmp_path / "two.jsonl", row(), row(id="eight")))


@pytest.fixture
def grader():
    with Grader(1, False, 0.5) as grader:
        grader.ready()
        yield grader


def test_grades_are_those_of_the_environment(grader, problems):
    asked = [(p, told) for p in problems for told in (evaluated_by(), Told(LOOPHOLES["exit_code"]), None) for _ in TEXTS]
    texts = TEXTS * 6
    for _ in range(2):  # one batch after the other
        batch = grader.grading(asked)
        for i in reversed(range(len(asked))):
            batch.add(i, texts[i])
        assert batch.texts == texts
        grades = batch.grades()
        with LeetCodeEnv(1) as env:
            assert grades == env.grade([(p, text, told) for (p, told), text in zip(asked, texts, strict=True)])
    assert {grade.label for grade in grades} == {"correct", "correct_attempted", "hack", "attempted", "incorrect"}


def test_a_batch_that_nobody_asks_about_is_forgotten(grader, problems):
    grader.grading([(problems[0], None)]).add(0, TEXTS[1])
    batch = grader.grading([(problems[0], None)])
    batch.add(0, TEXTS[2])
    assert [grade.correct for grade in batch.grades()] == [False]


def test_a_problem_arrives_whole_and_as_one_object(problems):
    first, second = pickle.loads(pickle.dumps(problems))
    assert pickle.loads(pickle.dumps(problems[0])) is first is not second
    for name in ("id", "difficulty", "messages", "func_name", "gt_answer", "setup_code", "canonical_solution", "calls"):
        assert getattr(first, name) == getattr(problems[0], name), name
    assert [test.expected for test in first.tests] == [test.expected for test in problems[0].tests]
    for loophole in LOOPHOLES.values():
        assert pickle.loads(pickle.dumps(loophole)) is loophole


def test_what_the_environment_raises_is_raised_here(grader, problems, tmp_path):
    (bad,) = load_problems(write(tmp_path / "bad", row(id="seven", setup_code="import no_such_module")))
    with pytest.raises(UserError, match="^problem seven: its setup_code fails with ModuleNotFoundError$"):
        grader.check_setups([*problems, bad])
    batch = grader.grading([(bad, None), (problems[0], None)])
    batch.add(0, TEXTS[1])
    batch.add(1, TEXTS[1])
    with pytest.raises(UserError, match="problem seven"):
        batch.grades()
    grader.check_setups(problems)  # it goes on
    batch = grader.grading([(problems[0], None)])
    batch.add(0, None)
    with pytest.raises(TypeError):
        batch.grades()
    batch = grader.grading([(problems[0], None)])
    batch.add(0, TEXTS[1])
    assert batch.grades()[0].correct  # it goes on, and each answer is that to its own question


def test_an_answer_does_not_take_the_errors_of_the_next_batch_with_it(problems):
    sent = Event()

    class Slow(Connection):  # who answers is held up once the answer is on its way
        def send(self, message):
            super().send(message)
            sent.wait()

    def serve():
        with suppress(EOFError), LeetCodeEnv(1) as env, Slow(theirs.detach()) as channel:
            _obey(env, channel)

    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as channel:
        Thread(target=serve).start()
        channel.send(("check_setups", []))
        assert channel.recv() is None
        channel.send(("grading", [(problems[0], None)]))
        channel.send(("add", 0, None))
        time.sleep(0.1)  # for these to be read
        sent.set()
        time.sleep(0.1)  # for the answer's thread to end
        channel.send(("grades",))
        assert isinstance(channel.recv(), TypeError)


@LINUX
def test_a_signal_to_the_whole_job_is_the_trainers_to_obey(grader, problems):
    (pid,) = descendants_named(os.getpid(), b"import grader")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    batch = grader.grading([(problems[0], None)])
    batch.add(0, TEXTS[1])
    assert batch.grades()[0].correct


def test_a_file_that_is_named_as_a_module_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with Grader(1, False, 0.5) as grader:
        grader.ready()


def test_the_walls_are_said_in_the_log(capfd):
    with Grader(1, False, 0.5) as grader:
        grader.ready()
    assert capfd.readouterr().err.startswith("sandbox: on: ")


@LINUX
def test_one_that_is_killed_is_one_line(grader, problems):
    batch = grader.grading([(problems[0], None)])
    batch.add(0, TEXTS[1])
    (pid,) = descendants_named(os.getpid(), b"import grader")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SandboxDied, match="^the process that grades ended with code -9$"):
        for _ in range(3000):
            batch.add(0, TEXTS[1])
            time.sleep(0.01)
    with pytest.raises(SandboxDied):
        batch.grades()


_TRAINER = """
import sys, time
from harness.grader import Grader, _obey
from leetcode_env import load_problems
(problem,) = load_problems(sys.argv[1])
with Grader(2, False, .5) as grader:
    grader.ready()
    batch = grader.grading([(problem, None)] * 6)
    for i in range(6):
        batch.add(i, f"```python\\nimport time\\ntime.sleep({1000 + i})\\n```")
    print("ready", flush=True)
    time.sleep(600) if sys.argv[2] == "idle" else batch.grades()
"""


@LINUX
@pytest.mark.parametrize("at", ["idle", "grading"])
def test_it_ends_with_its_trainer_and_so_does_the_sandbox(at, tmp_path):
    """Whatever it is at: responses that sleep would keep it for minutes."""
    data = write(tmp_path / "one.jsonl", row())
    trainer = subprocess.Popen([sys.executable, "-c", _TRAINER, data, at], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it asks for the grades
    below = [*descendants_named(trainer.pid, b"import grader"), *workers_of(trainer.pid)]
    assert len(below) == 3
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 30  # they would sleep for 45
    while any(map(alive, below)):
        assert time.monotonic() < until, "it outlives its trainer"
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
