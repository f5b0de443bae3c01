"""The sandbox as its caller sees it: values travel whole, limits hold, workers that die are replaced."""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy  # noqa: F401  # a program's answers are made by eval
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.errors import UserError
from sandbox import pool as sandbox
from sandbox import wire
from sandbox.pool import Program, Sandbox, SandboxDied, SandboxIncomplete
from sandbox.program import Verdict
from sandbox.wire import NotPlain, decode, encode
from sandbox.worker import TO_A_JOB, _cpu_seconds

ROOT = Path(sandbox.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pool():
    with Sandbox(workers=2) as pool:
        yield pool


def ask(pool, source, call="f()", **options):
    """(outcome, values that came back) of one call."""
    values = []
    (outcome,) = pool.run([Program(source, [call], lambda i, value: values.append(value) or True, **options)])
    return outcome, values


# ---- plain values -------------------------------------------------------------------------------------------------

TRAVELS = [
    "1", "-(2**70)", "10**5000", "0.1", "float('inf')", "-float('inf')", "-0.0", "1e300", "True", "None", "''", "'a\\x00b'",
    "'\\ud800\\udc00'", "'é\\U0001F600'", "[]", "[1, [2, [3]]]", "()", "(1,)", "([1], (2, 'x'))", "{}", "{1: 'a', 'b': [2]}",
    "{(1, 2): {3: 4}}", "set()", "{1, (2, 3), 'x'}", "[True, 1, 1.0]",
]  # fmt: skip
COLLECTIONS = [
    (defaultdict(list, {1: [2]}), "collections.defaultdict(list, {1: [2]})"),
    (Counter("abca"), "collections.Counter('abca')"),
    (OrderedDict([(2, 1), (1, 2)]), "collections.OrderedDict([(2, 1), (1, 2)])"),
    (deque([1, 2], maxlen=5), "collections.deque([1, 2], maxlen=5)"),
]
NUMPY = ["bool_(True)", "int8(-3)", "int64(2**40)", "uint64(2**63)", "float16(0.1)", "float32(0.1)", "float64(0.1)", "str_('x')"]
STAYS = [
    "b'x'", "1j", "frozenset([1])", "range(3)", "object()", "iter([1])", "(x for x in [1])", "len", "type", "Exception()",
    "type('I', (int,), {})(1)", "type('L', (list,), {})()", "bytearray(b'x')", "{1: b'x'}", "[object()]", "float",
    "collections.UserDict()", "collections.namedtuple('P', 'x')(1)", "__import__('numpy').array([1])",
    "__import__('numpy').datetime64('2020-01-01')", "__import__('decimal').Decimal(1)", "__import__('fractions').Fraction(1)",
]  # fmt: skip


def same(a, b):
    """Equal, of one type all the way down, with the sign of zero."""
    return type(a) is type(b) and repr(a) == repr(b) and a == b


@pytest.mark.parametrize("expression", TRAVELS)
def test_value_travels(pool, expression):
    outcome, values = ask(pool, f"def f(): return {expression}")
    assert outcome.passed and len(values) == 1
    expected = eval(expression)
    assert values[0] == expected and type(values[0]) is type(expected)
    if type(expected) is not set and expression != "10**5000":
        assert same(values[0], expected)


def test_nan_travels(pool):
    assert math.isnan(ask(pool, "def f(): return float('nan')")[1][0])


@pytest.mark.parametrize("expected, expression", COLLECTIONS)
def test_collection_travels(pool, expected, expression):
    outcome, (value,) = ask(pool, f"import collections\ndef f(): return {expression}")
    assert outcome.passed and value == expected and expected == value
    if type(expected) is not defaultdict:
        assert type(value) is type(expected)


def test_equality_is_that_of_the_type(pool):
    """deque([1]) is not [1], and ordered mappings compare by order with each other alone, as in plain Python."""
    source = "from collections import *\ndef f(): return [deque([1]), OrderedDict([(1, 1), (2, 2)]), Counter(a=0)]"
    queue, ordered, counter = ask(pool, source)[1][0]
    assert queue != [1] and queue == deque([1])
    assert ordered == {2: 2, 1: 1} and ordered != OrderedDict([(2, 2), (1, 1)])
    assert counter == Counter() and counter != {}


@pytest.mark.parametrize("expression", NUMPY)
def test_numpy_scalar_travels(pool, expression):
    outcome, (value,) = ask(pool, f"import numpy\ndef f(): return numpy.{expression}")
    expected = eval(f"numpy.{expression}").item()
    assert outcome.passed and type(value) is type(expected) and value == expected


@pytest.mark.parametrize("expression", STAYS)
def test_other_types_do_not_travel(pool, expression):
    outcome, values = ask(pool, f"import collections\ndef f(): return {expression}")
    assert not outcome.passed and values == [] and outcome.note == "error: NotPlain"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(plain)
def test_encoding_round_trip(value):
    assert same(decode(encode(value)), value)


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text('[]{}:,"0123456789einfNaTtuplsd -.', max_size=40).map(str.encode))
def test_any_bytes_decode_or_are_refused(data):
    with contextlib.suppress(NotPlain):
        decode(data)


def test_colliding_keys_cost_no_time():
    body = b'{"set":[' + b",".join(b'{"int":"%x"}' % (k * ((1 << 61) - 1)) for k in range(100_000)) + b"]}"
    started = time.process_time()
    with pytest.raises(NotPlain):
        decode(body)
    assert time.process_time() - started < 20  # it took minutes when the set was built


# ---- running ------------------------------------------------------------------------------------------------------


def test_outcomes_come_in_order(pool):
    programs = [Program(f"def f(): return {n}", ["f()"], lambda i, v, n=n: v == n) for n in range(50)]
    assert [o.passed for o in pool.run(programs)] == [True] * 50


@pytest.mark.parametrize("call", ["f(", "return 1", "f()\0", " f()", f"f({'1, ' * 1000})", "(lambda: f())()"])
def test_a_call_is_what_eval_makes_of_it(call, pool):
    """Whether it travels as code or, where it is long or not to be compiled, as text."""
    source = "def f(*args): return len(args)"
    try:
        expected, note = [eval(call, {"f": lambda *args: len(args)})], ""
    except (SyntaxError, ValueError) as error:
        expected, note = [], f"error: {type(error).__name__}"
    outcome, values = ask(pool, source, call)
    assert values == expected and outcome.note == note


def test_it_stops_at_the_first_wrong_answer(monkeypatch):
    """The second call would take for ever, and it is not the limits that end it."""
    ends, end = [], Verdict.end
    monkeypatch.setattr(Verdict, "end", lambda verdict, report, limits: (ends.append(report), end(verdict, report, limits)))
    source = "def f(n):\n    while n: pass\n    return 0"
    with Sandbox(workers=1, cpu_seconds=20, wall_seconds=60.0) as pool:
        ends.clear()
        (outcome,) = pool.run([Program(source, ["f(0)", "f(1)"], lambda i, v: False)])
    ((status, reason, _, _),) = ends
    assert outcome.note == "wrong answer to call 0"
    assert os.WTERMSIG(status) == signal.SIGKILL and reason == wire.ON_ITS_OWN


def test_calls_share_the_namespace_and_runs_do_not(pool):
    source = "seen = []\ndef f():\n    seen.append(1)\n    return len(seen)"
    for _ in range(3):
        (outcome,) = pool.run([Program(source, ["f()", "f()"], lambda i, v: v == i + 1)])
        assert outcome.passed


def test_setup_is_executed_once_and_inherited(pool):
    setup = "import time\nloaded = time.monotonic_ns()"
    values = [ask(pool, "def f(): return loaded", setup=setup)[1][0] for _ in range(6)]
    assert len(set(values)) <= 2  # one a worker


def test_a_setup_that_fails_is_told_to_a_caller_that_is_slow_to_ask(pool, monkeypatch):
    job = sandbox._job
    monkeypatch.setattr(sandbox, "_job", lambda program: (time.sleep(0.1), job(program))[1])
    assert ask(pool, "def f(): return 1", setup="1/0")[0].note == "error: setup"


def test_a_setup_that_fails_fails_its_runs_alone(pool):
    assert ask(pool, "def f(): return 1", setup="1/0")[0].note == "error: setup"
    assert ask(pool, "def f(): return 1")[0].passed


def test_runs_are_deterministic_across_workers(pool):
    source = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd'}), hash('x')]"
    setup = "import random"
    seen = []
    pool.run([Program(source, ["f()"], lambda i, v: seen.append(v) or True, setup=setup) for _ in range(12)])
    assert len(seen) == 12 and all(value == seen[0] for value in seen)


@pytest.mark.parametrize(
    "source, compiled, note",
    [
        ("def f(: pass", False, "error: SyntaxError"),
        ("return 1", False, "error: SyntaxError"),
        ("  x = 1\n y = 2", False, "error: IndentationError"),
        ("def f(): return 1\nraise SyntaxError", False, "error: SyntaxError"),
        ("x = '\0'", False, "error: "),
        ("x = '\ud800'", False, "error: UnicodeEncodeError"),
        ("(" * 500 + ")" * 500, False, "error: SyntaxError"),
        ("1/0", True, "error: ZeroDivisionError"),
        ("import no_such_module", True, "error: ModuleNotFoundError"),
        ("import sys; sys.exit()", True, "error: SystemExit"),
        ("import os; os._exit(0)", True, "exited before it answered"),
        ("x = 1", True, "error: NameError"),
        ("import os, signal; os.abort()", True, "killed by signal"),
        ("def f(): return bytearray(2 << 30)", True, "error: MemoryError"),
    ],
)
def test_what_went_wrong(pool, source, compiled, note):
    outcome, _ = ask(pool, source)
    assert not outcome.passed and outcome.compiled is compiled and outcome.note.startswith(note)


def test_cpu_time_decides():
    with Sandbox(workers=1, cpu_seconds=1, wall_seconds=60.0) as pool:
        outcome, _ = ask(pool, "def f():\n    while True: pass")
    assert outcome.note == "timeout: 1 s of CPU time"


def test_wall_time_backs_it_up():
    with Sandbox(workers=1, wall_seconds=2.0) as pool:
        outcome, _ = ask(pool, "import time\ndef f(): time.sleep(60)")
    assert outcome.note == "timeout: 2 s of wall time"


def test_a_program_at_work_on_a_crowded_core_gets_more_wall_time():
    """Asleep half of its time, as if another shared the core: it is not taken for a sleeper."""
    source = (
        "import time\ndef f():\n    end = time.monotonic() + 2.3\n    while time.monotonic() < end:\n"
        "        busy = time.process_time() + 0.005\n        while time.process_time() < busy: pass\n"
        "        time.sleep(0.005)\n    return 1"
    )
    with Sandbox(workers=1, wall_seconds=2.0) as pool:
        started = time.monotonic()
        assert ask(pool, source)[0].passed and time.monotonic() - started > 2.1


def test_the_probe_says_what_is_bound(pool):
    assert ask(pool, "f = run_tests = lambda: 1", probe="run_tests")[0].bound
    assert not ask(pool, "f = lambda: 1", probe="run_tests")[0].bound
    assert ask(pool, "import builtins\nbuiltins.g = f = lambda: 1", probe="g")[0].bound


def test_a_call_that_need_only_return(pool):
    def returns(source):
        return pool.run([Program(source, ["g()"], returns=True)])[0].passed

    assert returns("def g(): return object()")
    assert not returns("def g(): assert False")
    assert not returns("import sys\ndef g(): sys.exit(0)")
    assert not returns("import os\ndef g(): os._exit(0)")


# ---- workers ------------------------------------------------------------------------------------------------------


SLOW = "import time\ndef f(n):\n    time.sleep(n)\n    return 1"


def test_a_worker_that_dies_is_replaced_as_often_as_it_takes(caplog):
    """The real process is killed in the middle of a run, again and again; each run begins again elsewhere and ends right."""
    with Sandbox(workers=1) as pool:

        def accept(index, value):
            if index == 0 and pool.pids == [victim]:
                os.kill(victim, signal.SIGKILL)
            return value == 1

        slow = Program(SLOW, ["f(0)", "f(0.8)"], accept)
        for _ in range(4):
            victim = pool.pids[0]
            assert [o.passed for o in pool.run([slow, slow])] == [True, True] and pool.pids != [victim]
        assert pool.restarts == 4 and caplog.text.count("is replaced") == 3  # the first, the second, the fourth


def test_a_program_that_ends_its_worker_twice_is_judged_wrong_and_the_run_goes_on():
    """Whatever way it finds: here the judge kills the worker at the program's first answer."""
    with Sandbox(workers=1) as pool:

        def killed(index, value):
            os.kill(pool.pids[0], signal.SIGKILL)
            return True

        guilty = Program("import time\ndef f(n): time.sleep(n)", ["f(0)", "f(9)"], killed)
        honest = Program("def f(): return 1", ["f()"], lambda i, v: v == 1)
        outcomes = pool.run([honest, guilty, honest, guilty, honest])
        assert [o.passed for o in outcomes] == [True, False, True, False, True]
        assert outcomes[1].note == "ended its worker twice" and outcomes[1].compiled and pool.restarts == 4


def test_signals_to_a_whole_job_end_no_worker():
    """A scheduler sends them to every process: the run that a worker is at would be judged by what is left of it."""
    with Sandbox(workers=1) as pool:

        def signalled(index, value):
            for pid in (pool.pids[0], *outer):
                for number in TO_A_JOB:
                    os.kill(pid, number)
            return value == 1

        outer = [worker._process.pid for worker in pool._workers]
        (outcome,) = pool.run([Program(SLOW, ["f(0)", "f(0.5)"], signalled)])
        assert outcome.passed and pool.restarts == 0


def test_a_judge_that_fails_costs_the_worker_and_nobody_elses_run():
    with Sandbox(workers=1) as pool:

        def failing(index, value):
            time.sleep(0.3)  # until the worker has reported the run's end
            raise MemoryError

        with pytest.raises(MemoryError):
            pool.outcome(Program(SLOW, ["f(0)"], failing))
        seven = Program("import os\nos._exit(7)", [], lambda i, v: v == 7, look_at=wire.EXIT)  # the report that waits says 0
        assert pool.outcome(seven).passed and pool.restarts == 1


HANGING = Program("", ["None"], setup="while True: pass", returns=True)


def test_a_setup_that_hangs_is_an_error_and_the_worker_goes_on():
    with Sandbox(workers=1, wall_seconds=1.0) as pool:
        outcomes = pool.run([HANGING, Program(SLOW, ["f(0)"], lambda i, v: v == 1)])
        assert [o.passed for o in outcomes] == [False, True] and outcomes[0].note == "error: setup" and pool.restarts == 0
        assert ask(pool, "import signal\ndef f(): return signal.getsignal(signal.SIGALRM) is signal.SIG_DFL")[1] == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
def test_closing_ends_a_worker_that_executes_a_setup():
    """It hears nothing meanwhile; what waits behind it fails at once."""
    pool = Sandbox(workers=1, wall_seconds=600.0)
    asked = [pool.submit(pool.outcome, HANGING) for _ in range(3)]
    (worker,) = pool._workers
    before = _cpu_seconds(worker.pid)
    while _cpu_seconds(worker.pid) < before + 0.3:  # it is at it
        time.sleep(0.01)
    pool.close()
    assert worker._process.poll() is not None
    until = time.monotonic() + 60
    while Path(f"/proc/{worker.pid}").exists():  # it goes with the process that it was started by
        assert time.monotonic() < until
        time.sleep(0.01)
    assert all(isinstance(call.exception(60), RuntimeError) for call in asked)
    assert pool.restarts <= 1, "no worker is replaced for those that wait"


def test_only_a_machine_that_runs_no_honest_program_stops_a_run(monkeypatch):
    with Sandbox(workers=1) as pool:
        monkeypatch.setattr(sandbox, "_START_SECONDS", 1.0)
        monkeypatch.setattr(sys, "executable", "/bin/false")
        os.kill(pool.pids[0], signal.SIGKILL)
        with pytest.raises(SandboxDied, match="did not start: (it ended without a word|timed out)"):
            pool.run([Program("def f(): return 1", ["f()"], lambda i, v: True)])
    with pytest.raises(SandboxDied):
        Sandbox(workers=1)


def test_nobody_but_the_worker_can_report(pool):
    """Another process that holds the worker's end of the control socket writes reports there; the kernel says who wrote them."""
    with Sandbox(workers=1) as pool:
        control = stolen_descriptor(pool.pids[0], 0)
        forged = wire.REPORT.pack(0, wire.WALL_TIME, 0.0, 0)
        with socket.socket(fileno=control) as socket_of_the_worker:
            for _ in range(5):
                socket_of_the_worker.sendall(forged[:-1] + forged)
                outcome, _ = ask(pool, "import os\nos._exit(0)")
                assert outcome.note == "exited before it answered"
        assert pool.restarts == 0


def stolen_descriptor(pid, number):
    """A copy of another process's descriptor; skips where the kernel does not hand it out."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = libc.syscall(434, pid, 0)  # pidfd_open
    copy = libc.syscall(438, process, number, 0)  # pidfd_getfd
    os.close(process)
    if copy < 0:
        pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    return copy


HOLDS_MANY = (
    "import os\nclass Solution:\n    def f(self, n):\n        held = []\n        for fd in range(1 << 16):\n            try:\n"
    "                os.fstat(fd)\n            except OSError:\n                continue\n            held.append(fd)\n"
    "            if fd > 3: os.write(fd, bytes(13) * 3)\n        return held"
)


def test_a_run_holds_four_descriptors_however_many_the_caller_has():
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(320)]
    for fd in held:
        os.set_inheritable(fd, True)
    try:
        with Sandbox(workers=1) as pool:
            assert ask(pool, HOLDS_MANY, "Solution().f(1)")[1] == [[0, 1, 2, 3]]
            for n in range(3):
                assert ask(pool, f"def f(): return {n}")[1] == [n]
    finally:
        for fd in held:
            os.close(fd)


STARVE = (
    "import threading, time\nthreading.stack_size(32768)\ntry:\n    while True:\n        threading.Thread(target=time.sleep, "
    "args=(60,)).start()\nexcept RuntimeError:\n    time.sleep(60)"
)
THREADS = (
    "from threading import Thread\ndef f():\n    seen = []\n"
    "    threads = [Thread(target=seen.append, args=(n,)) for n in range(8)]\n"
    "    for t in threads: t.start()\n    for t in threads: t.join()\n    return sorted(seen)"
)


@pytest.mark.parametrize("without", [[], ["namespaces"], ["private_root"]], ids=lambda names: "-".join(names) or "all")
def test_threads_until_refused_starve_nobody_else(without):
    """One worker's program takes every thread that it can get; programs of other workers, with threads of their own, go on,
    and so do those of another sandbox."""
    expected = list(range(8))
    with Sandbox(workers=2, wall_seconds=5.0, without=without) as one, Sandbox(workers=1, without=without) as other:
        beside = threading.Thread(target=one.run, args=([Program(STARVE, ["f()"], lambda i, v: True)] * 2,))
        beside.start()
        time.sleep(0.5)
        assert ask(other, THREADS)[1] == [expected] and beside.is_alive()  # at once, and not when the thief has been ended
        while beside.is_alive():
            assert ask(other, THREADS)[1] == [expected]
        assert ask(one, THREADS)[1] == [expected]
        assert one.restarts == other.restarts == 0


def test_folders_of_killed_owners_are_swept_at_the_next_start(tmp_path, monkeypatch):
    """And those of living owners, and what only looks like one, are not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "sandbox-of-somebody").mkdir()
    source = "import os, signal\nfrom sandbox.pool import Sandbox\nSandbox(workers=1)\nos.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", source], env={"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)})
    assert len(list(tmp_path.iterdir())) == 2
    with Sandbox(workers=1) as pool:
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([os.path.basename(pool._base), "sandbox-of-somebody"])
        with Sandbox(workers=1):
            assert len(list(tmp_path.iterdir())) == 3
        assert os.path.isdir(pool._base)


def test_a_deep_tree_of_a_killed_owner_goes_too(tmp_path, monkeypatch):
    """A run was building it when its trainer was killed; a removal that recurses would end every later start."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "sandbox-left"
    left.mkdir()
    (left / "lock").touch()
    monkeypatch.chdir(left)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    Sandbox(workers=1).close()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_closes_nothing_of_others():
    pool = Sandbox(workers=1)
    number = pool._lock
    pool.close()
    others = os.open("/dev/null", os.O_RDONLY)
    os.dup2(others, number)
    pool.close()
    os.fstat(number)
    os.close(number)


def test_no_temporary_directory_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="needs a temporary directory to write to: No such file or directory; set TMPDIR"):
        Sandbox(workers=1)


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_root_without_capabilities():
    """As in a container without any: the layers that need them are off and named, and programs are judged all the same."""
    source = (
        "from sandbox.pool import *\nwith Sandbox(workers=1) as pool:\n"
        "    print(pool.run([Program('def f(): return 1', ['f()'], lambda i, v: v == 1)])[0].passed)"
    )
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n" and "Traceback" not in done.stderr


def test_killing_the_worker_between_runs_is_noticed():
    with Sandbox(workers=2) as pool:
        os.kill(pool.pids[1], signal.SIGKILL)
        time.sleep(0.1)
        programs = [Program("def f(): return 1", ["f()"], lambda i, v: v == 1)] * 20
        assert all(o.passed for o in pool.run(programs))


def test_close_leaves_no_process_and_no_file():
    pool = Sandbox(workers=2)
    pids, base = pool.pids, pool._base
    pool.close()
    assert not os.path.exists(base)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_an_interrupted_batch_is_not_mistaken_for_the_next(pool):
    """An exception in the caller's own judge ends the pool's workers instead of leaving answers in flight."""
    with Sandbox(workers=1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.run([Program("def f(): return 1", ["f()"], lambda i, v: 1 / 0)])
        with pytest.raises(RuntimeError):
            pool.run([Program("def f(): return 1", ["f()"], lambda i, v: True)])


def test_strict_refuses_a_missing_wall():
    with pytest.raises(SandboxIncomplete, match="seccomp"):
        Sandbox(workers=1, strict=True, without=["seccomp"])


def test_the_layers_are_reported_in_one_line(caplog):
    caplog.set_level("INFO")
    Sandbox(workers=1, without=["landlock"]).close()
    infos = [r.getMessage() for r in caplog.records if r.levelname == "INFO"]
    assert len(infos) == 1 and "rlimits" in infos[0] and "off: landlock" in infos[0]


@pytest.mark.slow
def test_a_thousand_equal_verdicts_under_full_load():
    """Every core is kept busy twice over, and one program that takes some 30 ms is judged a thousand times."""
    cores = len(os.sched_getaffinity(0))
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)]
    try:
        expected = sum(i * i for i in range(300_000))
        program = Program("def f(n): return sum(i * i for i in range(n))", ["f(300000)"], lambda i, v: v == expected)
        with Sandbox() as pool:
            assert {o.passed for o in pool.run([program] * 1000)} == {True}
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
