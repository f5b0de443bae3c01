"""What the attack suite cannot see: traces that a run leaves, kernels and callers of other kinds, what a verdict costs."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sandbox import pool as sandbox
from sandbox.pool import Program, Sandbox, SandboxDied
from sandbox.wire import NotPlain, decode

ROOT = Path(sandbox.__file__).resolve().parent.parent


def values(pool, source, **options):
    """What f() of the program returned: [] when nothing came back."""
    seen = []
    pool.run([Program(source, ["f()"], lambda i, value: seen.append(value) or True, **options)])
    return seen


# ---- traces -------------------------------------------------------------------------------------------------------

LOCK = (
    "import fcntl, struct\ndef f():\n    for fd in (0, 1, 2):\n        for order in (37, 6):\n            try:\n"
    "                fcntl.fcntl(fd, order, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 123456, 1, 0))\n"
    "            except OSError: pass"
)
LOCKED = (
    "import fcntl, struct\ndef f():\n    asked = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0)\n"
    "    try: return struct.unpack('hhqqi4x', fcntl.fcntl(1, 5, asked))[2]\n    except OSError: return 0"
)


@pytest.mark.parametrize("without", [[], ["seccomp"]], ids=["all", "seccomp"])
def test_a_lock_tells_the_next_run_nothing(without):
    """A lock of an open file lives as long as that, and so in descriptors that all runs of a worker share."""
    with Sandbox(workers=1, without=without) as pool:
        assert values(pool, LOCK) == [None]
        assert values(pool, LOCKED) == [0]


def test_the_times_of_the_folder_tell_the_next_run_nothing():
    with Sandbox(workers=1) as pool:
        values(pool, "import os\ndef f(): os.utime('..', (4e9, 4e9))")
        assert values(pool, "import os\ndef f(): return os.stat('..').st_atime > 3e9") == [False]


@pytest.mark.parametrize("without", [[], ["seccomp"], ["private_root"]], ids=lambda names: "-".join(names) or "all")
def test_devices_keep_their_times(without):
    """They are the system's own, which everybody may write to, and so set to the present time."""
    devices = ("/dev/null", "/dev/zero", "/dev/urandom")
    before = [os.stat(d).st_mtime_ns for d in devices]
    touch = "        try: os.utime(place)\n        except OSError: pass"
    source = f"import os\ndef f():\n    for place in (*{devices}, 0, 1, 2):\n{touch}"
    with Sandbox(workers=1, without=without) as pool:
        assert values(pool, source) == [None]
        assert values(pool, "def f(): return open('/dev/null', 'w').write('x') + len(open('/dev/zero', 'rb').read(2))") == [3]
    assert [os.stat(d).st_mtime_ns for d in devices] == before


# ---- old kernels --------------------------------------------------------------------------------------------------

OLD_KERNEL = """
import os, sys
from pathlib import Path
from sandbox import confine, scratch
abi, folder = int(sys.argv[1]), sys.argv[2]
real = confine.syscall
confine.syscall = lambda number, *args, what: abi if args == (0, 0, 1) else real(number, *args, what=what)
layers = confine.Layers()
os.makedirs(folder + "/runs/one")
Path(folder, "victim").write_text("precious")
os.utime(folder + "/victim", (1, 1))
confine.wall_in(layers, folder + "/runs")
if "landlock" not in layers.on or "seccomp" not in layers.on:
    sys.exit(77)
os.chdir(folder + "/runs/one")
for _ in range(30):
    os.makedirs("a/b")
    Path("a/file").write_text("x")
    os.chmod("a/file", 0)
    os.chdir("a")
os.chdir("/")
os.chmod(folder + "/runs/one/a/a", 0)
assert scratch.sweep(folder + "/runs/one", folder + "/runs") and os.listdir(folder + "/runs") == []
layers.run_filter.install()
for action in (
    lambda: os.truncate(folder + "/victim", 3),
    lambda: os.utime(folder + "/victim", (2, 2)),
    lambda: os.open(folder + "/victim", os.O_TRUNC | os.O_RDONLY),
    lambda: os.open(folder + "/victim", os.O_TRUNC | 3),
    lambda: os.open(folder + "/victim", os.O_TRUNC | os.O_WRONLY),
):
    try: action()
    except OSError: pass
with open(folder + "/runs/written", "w") as handle: handle.write("x")
with open(folder + "/runs/written", "w") as handle: handle.write("y")
"""


@pytest.mark.parametrize("abi", [1, 2, 3])
def test_old_landlock(abi, tmp_path):
    """Before ABI 3 it lets anybody empty a file, before ABI 2 nobody move a directory: no run does the one, no sweep needs the
    other. Landlock is told here to handle what it did then."""
    done = subprocess.run([sys.executable, "-c", OLD_KERNEL, str(abi), str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("no Landlock or no system-call filter here")
    assert done.returncode == 0, done.stderr
    victim = tmp_path / "victim"
    assert victim.read_text() == "precious" and victim.stat().st_mtime == 1
    assert (tmp_path / "runs" / "written").read_text() == "y"


# ---- callers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o077, 0o777])
def test_the_callers_umask_takes_no_wall_down(mask):
    """A root that nobody may pass through would leave root in charge of the runs."""
    with Sandbox(workers=1) as pool:
        expected = set(pool.layers["on"])
    before = os.umask(mask)
    try:
        with Sandbox(workers=1) as pool:
            assert set(pool.layers["on"]) == expected
            assert values(pool, "import json, os\nos.mkdir('d')\ndef f(): return 1") == [1]
    finally:
        os.umask(before)


def test_signals_that_the_caller_blocks_still_tell_the_worker_that_a_run_has_ended():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    try:
        with Sandbox(workers=1) as pool:
            assert values(pool, "def f(): return 1") == [1]
            assert values(pool, "import signal\ndef f(): return len(signal.pthread_sigmask(0, ()))") == [0]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


CLOSED = """
import os, sys
for n in (0, 1, 2): os.close(n)
from sandbox.pool import *
with Sandbox(workers=2) as pool:
    right = []
    for _ in range(10):
        for n in (0, 1, 2):
            try: os.write(n, b"a warning of some library " * 9)
            except OSError: pass
        right += [o.passed for o in pool.run([Program("def f(): return 1", ["f()"], lambda i, v: v == 1)] * 4)]
open(sys.argv[1], "w").write(f"{all(right)} {pool.restarts}")
"""


def test_a_caller_without_standard_streams(tmp_path):
    """What a library writes to standard error does not become a worker's request because its socket has that number."""
    subprocess.run([sys.executable, "-c", CLOSED, str(tmp_path / "said")], cwd=ROOT, timeout=300)
    assert (tmp_path / "said").read_text() == "True 0"


def test_runs_go_before_the_trainer_when_memory_is_out():
    with Sandbox(workers=1) as pool:
        assert Path(f"/proc/{pool.pids[0]}/oom_score_adj").read_text() == "1000\n"


def test_a_full_temporary_directory_is_one_line(monkeypatch):
    real, made = tempfile.mkdtemp, []

    def full(*args, **options):
        if made:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made.append(real(*args, **options))
        return made[0]

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(SandboxDied, match="a sandbox worker did not start: .*No space left on device"):
        Sandbox(workers=1)
    assert not os.path.exists(made[0])


def test_a_pool_closed_while_a_worker_is_replaced_waits_for_no_program(monkeypatch):
    """The new worker is not among those that `close` has hung up on: it must not begin the program anew."""
    with Sandbox(workers=1) as pool:
        os.kill(pool.pids[0], signal.SIGKILL)

        class Late(sandbox._Worker):
            def __init__(self, *args):
                super().__init__(*args)
                pool._closed = True

        monkeypatch.setattr(sandbox, "_Worker", Late)
        with pytest.raises(RuntimeError, match="the sandbox is closed"):
            pool.run([Program("import time\ndef f(): time.sleep(60)", ["f()"], lambda i, v: True)])


def test_a_worker_that_is_just_starting_has_no_process_id_to_send_signals_to(monkeypatch):
    """0 would be the caller's own process group."""
    with Sandbox(workers=1) as pool:
        monkeypatch.setattr(pool._workers[0], "pid", 0)
        assert pool.pids == []


# ---- what a verdict costs -----------------------------------------------------------------------------------------


def test_bytes_sent_one_by_one_cost_the_caller_little():
    """Seconds of CPU time it was: a wakeup for every byte."""
    source = (
        "import os\ndef f():\n    os.write(3, b'A' + (1 << 22).to_bytes(4, 'big'))\n    write = os.write\n"
        "    while True: write(3, b' ')"
    )
    with Sandbox(workers=1, cpu_seconds=2, wall_seconds=4.0) as pool:
        started = time.process_time()
        assert values(pool, source) == []
        assert time.process_time() - started < 0.5


def test_many_small_answers_arrive():
    """More than are read as they come: an honest program that computes for seconds sends them."""
    source = "import time\ndef f(n):\n    time.sleep(0.021)\n    return n"
    calls = [f"f({n})" for n in range(90)]
    with Sandbox(workers=1) as pool:
        (outcome,) = pool.run([Program(source, calls, lambda i, value: value == i)])
    assert outcome.passed


@pytest.mark.parametrize(
    "body",
    ['{"int":"0x10"}', '{"int":" 1"}', '{"int":"1_0"}', '{"int":"+1"}', '{"int":"F"}', '{"int":"01"}', '{"int":"-0"}',
     '{"int":"\\u0661"}', '{"int":["1"]}', '{"int":1}', '{"str":"ab"}', '{"str":{"1":2}}', '{"str":[1114112]}', '{"str":[-1]}',
     '{"str":[1.0]}', '{"str":["a"]}', '{"str":[[1]]}', '{"str":5}', '{}', '{"int":"1","str":[1]}'],
)  # fmt: skip
def test_tags_hold_what_the_encoder_writes_and_nothing_else(body):
    with pytest.raises(NotPlain):
        decode(body.encode())
