"""The attack suite: no program is judged correct, nothing outside changes, and the judge goes on as if nothing had been."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from support.attack_programs import ATTACKS

from sandbox import pool as sandbox
from sandbox.pool import Program, Sandbox

PROJECT = Path(sandbox.__file__).parent.parent
CODE = [*sorted(PROJECT.glob("sandbox/*.py")), *sorted(PROJECT.glob("faults/*.py"))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data file with the answers, readable by all, and the places that no run may touch."""
    folder = tmp_path_factory.mktemp("world")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/") and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)  # so that it is the sandbox which denies it, not the file's mode
    answers = [random.SystemRandom().getrandbits(60) for _ in range(3)]
    dataset = folder / "answers.txt"
    dataset.write_text("\n".join(map(str, answers)))
    dataset.chmod(0o644)
    home = folder / "home"
    home.mkdir()
    home.chmod(0o777)
    return {"folder": folder, "dataset": dataset, "home": home, "answers": answers}


@pytest.fixture(scope="module")
def pool():
    with Sandbox(workers=1, cpu_seconds=1, wall_seconds=2.0) as pool:
        print("layers on:", ", ".join(pool.layers["on"]), "| off:", ", ".join(pool.layers["off"]) or "none")
        yield pool


def response(name, world):
    source = ATTACKS[name]
    for word, value in (("DATASET", world["dataset"]), ("PROJECT", PROJECT), ("HOME", world["home"]), ("TRAINER", os.getpid())):
        source = source.replace(word, str(value))
    return source


def attack(source, world):
    answers = world["answers"]
    return Program(source, [f"Solution().f({n})" for n in (1, 2, 3)], lambda i, value: value == answers[i], probe="run_tests")


def honest(n):
    """A program that is right, and one in four that is wrong; (program, whether it passes)."""
    source = f"class Solution:\n    def f(self, xs):\n        return sorted(x * {n} for x in xs if x % 2)"
    expected = [[n, 3 * n], [n] if n % 4 else [0]]
    return Program(source, ["Solution().f([3, 2, 1])", "Solution().f([1])"], lambda i, v: v == expected[i]), bool(n % 4)


def outside(world):
    """What a run could have changed: files' contents and the folders' lists."""
    places = [PROJECT, world["folder"], world["home"], Path("/dev/shm")]
    state = {str(p): sorted(q.name for q in p.iterdir() if q.name != "__pycache__" and "sandbox" in q.name) for p in places}
    state["temporary"] = Path("/tmp/owned-by-a-sandboxed-run").exists(), Path("/dev/shm/owned-by-a-sandboxed-run").exists()
    state["dataset"] = world["dataset"].read_text()
    state["code"] = [p.read_bytes() for p in CODE]
    state["etc"] = Path("/etc/owned").exists()
    return state


def descendants(pid):
    """Process ids below `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(child)]
    return found


def resources(pid):
    """(open descriptors, resident KiB) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return len(os.listdir(f"/proc/{pid}/fd")), int(status.split("VmRSS:")[1].split()[0])


def test_there_are_sixty_attacks_and_each_is_a_program():
    assert len(ATTACKS) >= 60
    for name, source in ATTACKS.items():
        compile(source, name, "exec")


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("honest_runs", [pytest.param(10, id="then10"), pytest.param(100, id="then100", marks=pytest.mark.slow)])
def test_attack(name, honest_runs, pool, world):
    """Not judged correct; nothing outside changed; the next honest programs are judged right; nobody and nothing stays."""
    before, fds = outside(world), len(os.listdir("/proc/self/fd"))
    worker_before = resources(pool.pids[0])
    (outcome,) = pool.run([attack(response(name, world), world)])
    assert not outcome.passed and outcome.note
    assert outside(world) == before
    assert descendants(pool.pids[0]) == []
    programs, expected = zip(*(honest(n) for n in range(1, honest_runs + 1)), strict=True)
    assert [o.passed for o in pool.run(programs)] == list(expected)
    assert len(os.listdir("/proc/self/fd")) == fds
    worker_after = resources(pool.pids[0])
    assert worker_after[0] == worker_before[0]
    assert worker_after[1] <= worker_before[1] + 1024


def test_the_suite_can_fail(pool, world):
    """The same problem, answered by a program that was told: the harness judges it correct."""
    (outcome,) = pool.run([attack(f"class Solution:\n    def f(self, n): return {world['answers']}[n - 1]", world)])
    assert outcome.passed and outcome.note == ""


def test_no_worker_died_over_the_whole_suite(pool):
    assert pool.restarts == 0


# ---- each wall alone ----------------------------------------------------------------------------------------------

READS = ["read_dataset", "read_dataset_through_symlink", "read_dataset_by_relative_path", "import_project", "list_root",
         "read_dataset_through_proc_root", "proc_environ", "proc_memory"]  # fmt: skip
WRITES = ["write_home", "write_temporary_directory", "write_shared_memory", "overwrite_project_through_symlink"]
PROCESSES = ["fork_bomb", "detached_grandchild", "kill_parent", "kill_everyone", "kill_trainer", "kill_group", "subprocess",
             "execv", "posix_spawn", "stop_self", "signals_by_descriptor_owner", "threads_until_refused"]  # fmt: skip
NETWORK = ["tcp_socket", "udp_socket", "unix_socket", "netlink_socket"]
INSIDE = ["always_equal_object", "forged_answers", "memory_bomb", "deep_directories", "closed_descriptors", "endless_import",
          "many_files", "thread_outlives", "ptrace_parent", "read_trainer_memory", "unremovable_directory",
          "names_that_the_sweep_used", "full_folder_beside", "report_frames_everywhere"]  # fmt: skip

WALLS_DOWN = {
    "no Landlock": (["landlock"], READS + WRITES + PROCESSES + NETWORK + INSIDE),
    "no seccomp": (["seccomp"], READS + WRITES + PROCESSES + NETWORK + INSIDE),
    "no namespaces": (["namespaces"], READS + WRITES + PROCESSES + NETWORK + INSIDE),
    "no private root": (["private_root"], READS + WRITES + PROCESSES + NETWORK + INSIDE),
    "namespaces alone": (["landlock", "seccomp", "no_new_privs"], READS + WRITES + INSIDE),
    "seccomp and rlimits alone": (["landlock", "namespaces", "unprivileged"], PROCESSES + NETWORK + INSIDE),
    "rlimits alone": (
        ["landlock", "seccomp", "namespaces", "no_new_privs", "unprivileged"],
        ["always_equal_object", "forged_answers", "detached_grandchild", "endless_import", "memory_bomb", "deep_directories"],
    ),
}


ORDINARY = ("no Landlock", "namespaces alone")
CASES = [case if case in ORDINARY else pytest.param(case, marks=pytest.mark.slow) for case in WALLS_DOWN]


@pytest.mark.parametrize("case", CASES)
def test_with_walls_down(case, world, caplog):
    """The attacks that the walls still up are there for, and the one loud line that says which are not."""
    without, names = WALLS_DOWN[case]
    with Sandbox(workers=1, without=without, cpu_seconds=1, wall_seconds=2.0) as pool:
        loud = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(loud) == 1 and all(name in loud[0] for name in without)
        for name in names:
            before = outside(world)
            (outcome,) = pool.run([attack(response(name, world), world)])
            assert not outcome.passed, name
            assert outside(world) == before, name
            assert descendants(pool.pids[0]) == [], name
        programs, expected = zip(*(honest(n) for n in range(1, 21)), strict=True)
        assert [o.passed for o in pool.run(programs)] == list(expected)


def elsewhere(folder, names, world, without=(), **who):
    """(layers, whether each attack passed, and last an honest program) with a plain system interpreter, as somebody else."""
    interpreter = "/usr/bin/python3"
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    if not os.path.exists(interpreter) or subprocess.run([interpreter, "-c", "import ctypes"]).returncode:
        pytest.skip("no system interpreter that another user may run")
    for path in CODE:
        copy = folder / path.relative_to(PROJECT)
        copy.parent.mkdir(exist_ok=True)
        copy.parent.chmod(0o755)
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o644)
    for place in (folder, *folder.parents):
        if str(place).startswith("/tmp/"):
            place.chmod(0o755)
    (folder / "go.py").write_text(
        "import sys, json\n"
        "from sandbox.pool import Program, Sandbox\n"
        "sources, without = json.load(sys.stdin)\n"
        "with Sandbox(workers=1, without=without, cpu_seconds=1, wall_seconds=2.0) as pool:\n"
        "    ask = lambda source: Program(source, ['Solution().f(1)'], lambda i, v: v == 918273645)\n"
        "    outcomes = pool.run([ask(s) for s in sources] + [ask('class Solution:\\n    def f(self, n): return 918273645')])\n"
        "    print(json.dumps([pool.layers, [o.passed for o in outcomes]]))\n"
    )
    done = subprocess.run(
        [interpreter, "go.py"],
        input=json.dumps([[response(name, world) for name in names], list(without)]),
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": "/tmp"},
        text=True,
        capture_output=True,
        **who,
    )
    assert done.returncode == 0, done.stderr
    layers, passed = json.loads(done.stdout)
    print("layers on:", ", ".join(layers["on"]), "| off:", ", ".join(layers["off"]) or "none")
    return layers, passed


@pytest.mark.slow
def test_as_an_ordinary_user(world, tmp_path):
    names = READS + WRITES + PROCESSES + NETWORK + INSIDE
    layers, passed = elsewhere(tmp_path, names, world, user=12345, group=12345, extra_groups=[])
    assert "rlimits" in layers["on"] and "unprivileged" in layers["on"]
    assert passed == [False] * len(names) + [True]


def test_root_becomes_another_user_without_namespaces(world, tmp_path):
    """The walls that a container without any privilege still has: root drops its rights in place."""
    names = ["always_equal_object", "read_dataset", "kill_trainer", "write_home", "tcp_socket", "fork_bomb"]
    layers, passed = elsewhere(tmp_path, names, world, without=["namespaces"])
    assert layers["on"]["unprivileged"].startswith("root became uid ") and "namespaces" in layers["off"]
    assert passed == [False] * len(names) + [True]
