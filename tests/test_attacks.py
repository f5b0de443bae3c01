"""The attack suite: no program is judged correct, nothing outside changes, and the judge goes on as if nothing had been."""

import json
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest
from support.attack_programs import ATTACKS

from sandbox import pool as sandbox
from sandbox.pool import Program, Sandbox

PROJECT = Path(sandbox.__file__).parent.parent
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
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


def judged(pool, programs):
    """Whether each honest program passes. One that the clock ended, on a machine that stood still for seconds, runs again."""
    outcomes = pool.run(programs)
    late = [i for i, outcome in enumerate(outcomes) if outcome.note.endswith("of wall time")]
    assert len(late) <= 1
    for i in late:
        (outcomes[i],) = pool.run([programs[i]])
    return [outcome.passed for outcome in outcomes]


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
    state["metadata"] = [(s.st_mode, s.st_size, s.st_mtime_ns) for s in map(os.stat, (world["dataset"], world["home"], *DEVICES))]
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


def test_there_are_two_hundred_attacks_and_each_is_a_program():
    assert len(ATTACKS) >= 200
    for name, source in ATTACKS.items():
        compile(source, name, "exec")


# They end at the limit of CPU or wall time, a second or two later, as others do that the ordinary suite keeps.
AT_THE_LIMIT = {
    "endless_del", "immortal_import_hook", "endless_compile", "fault_with_a_handler", "time_limit_with_a_handler",
    "interpreter_lock_held", "lock_that_nobody_frees", "device_without_end", "copies_of_a_decompression_bomb",
}  # fmt: skip
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in AT_THE_LIMIT else name for name in ATTACKS]


@pytest.mark.parametrize("name", NAMES)
def test_attack(name, pool, world, honest_runs=10):
    """Not judged correct; nothing outside changed; the next honest programs are judged right; nobody and nothing stays."""
    before, fds = outside(world), len(os.listdir("/proc/self/fd"))
    worker_before = resources(pool.pids[0])
    (outcome,) = pool.run([attack(response(name, world), world)])
    assert not outcome.passed and outcome.note
    assert outside(world) == before
    assert descendants(pool.pids[0]) == []
    programs, expected = zip(*(honest(n) for n in range(1, honest_runs + 1)), strict=True)
    assert judged(pool, programs) == list(expected)
    assert len(os.listdir("/proc/self/fd")) == fds
    worker_after = resources(pool.pids[0])
    assert worker_after[0] == worker_before[0]
    assert worker_after[1] <= worker_before[1] + 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ATTACKS)[::4])
def test_attack_then_a_hundred(name, pool, world):
    test_attack(name, pool, world, honest_runs=100)


def test_the_suite_can_fail(pool, world):
    """The same problem, answered by a program that was told: the harness judges it correct."""
    (outcome,) = pool.run([attack(f"class Solution:\n    def f(self, n): return {world['answers']}[n - 1]", world)])
    assert outcome.passed and outcome.note == ""


def test_no_worker_died_over_the_whole_suite(pool):
    assert pool.restarts == 0


# ---- each wall alone ----------------------------------------------------------------------------------------------

READS = [
    "read_dataset", "read_dataset_through_symlink", "read_dataset_by_relative_path", "import_project", "list_root",
    "read_dataset_through_proc_root", "proc_environ", "proc_memory", "time_zone_file", "dataset_as_a_library",
    "database_attached", "mapped_dataset", "file_handles", "copied_in_the_kernel", "walk_by_path_descriptors",
    "working_directory_upwards", "own_landlock", "process_controls", "namespaces_of_others",
]  # fmt: skip
WRITES = [
    "write_home", "write_temporary_directory", "write_shared_memory", "overwrite_project_through_symlink", "times_by_name",
    "modes_by_name", "emptied_by_name", "removed_by_name", "planted_bytecode", "library_mapped_for_writing",
    "named_shared_memory", "exchanged_directories", "extended_attributes", "times_of_devices", "victim_of_the_memory_killer",
]  # fmt: skip
PROCESSES = [
    "fork_bomb", "detached_grandchild", "kill_parent", "kill_everyone", "kill_trainer", "kill_group", "subprocess", "execv",
    "posix_spawn", "stop_self", "signals_by_descriptor_owner", "threads_until_refused", "process_descriptors",
    "signals_by_other_calls", "processes_by_other_calls", "zombies", "adopted_grandchildren", "orphan_holds_the_channel",
    "news_of_children_for_the_worker", "stopped_worker", "interpreter_executed", "system_call_instruction",
    "signals_by_device_orders", "first_in_every_queue", "first_thread_leaves_alone",
]  # fmt: skip
NETWORK = ["tcp_socket", "udp_socket", "unix_socket", "netlink_socket", "abstract_socket", "packets_as_they_are",
           "waiting_for_visitors"]  # fmt: skip
INSIDE = [
    "always_equal_object", "forged_answers", "memory_bomb", "deep_directories", "closed_descriptors", "endless_import",
    "many_files", "thread_outlives", "ptrace_parent", "read_trainer_memory", "unremovable_directory",
    "names_that_the_sweep_used", "full_folder_beside", "report_frames_everywhere", "own_folder_becomes_a_link",
    "own_folder_becomes_a_file", "masked_tree", "deep_tree_of_closed_directories", "odd_names", "longest_names_in_depth",
    "folder_in_motion", "fifos_and_device_files", "immutable_files", "locks_on_shared_descriptions", "requests_to_the_worker",
    "patched_exit", "worker_called", "calls_of_the_other_architecture", "bad_robust_futexes", "keys_kept_by_the_kernel",
    "objects_of_system_v", "channel_closed_early", "channel_replaced", "sockets_among_themselves", "interpreter_ended",
]  # fmt: skip
# One or two of each kind, the holes of earlier rounds among them, for callers of other kinds.
CHOSEN = [
    "names_that_the_sweep_used", "full_folder_beside", "report_frames_everywhere", "signals_by_descriptor_owner",
    "threads_until_refused", "forged_answers", "requests_to_the_worker", "locks_on_shared_descriptions", "times_by_name",
    "emptied_by_name", "kill_trainer", "kill_everyone", "memory_bomb", "deep_tree_of_closed_directories", "odd_names",
    "worker_called", "patched_exit", "channel_closed_early", "first_thread_leaves_alone", "named_shared_memory",
]  # fmt: skip

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
        assert judged(pool, programs) == list(expected)


CALLERS = pytest.mark.parametrize(
    "without", [pytest.param([], id="all"), pytest.param(["namespaces"], id="no-namespaces", marks=pytest.mark.slow)]
)


@CALLERS
def test_with_three_hundred_descriptors_open(without, world):
    """Whatever the caller holds, inheritable or not, no run holds it."""
    held = [os.open(world["dataset"], os.O_RDONLY) for _ in range(300)]
    for fd in held[::2]:
        os.set_inheritable(fd, True)
    try:
        with Sandbox(workers=1, cpu_seconds=1, wall_seconds=1.0, without=without) as pool:
            before = outside(world)
            outcomes = pool.run([attack(response(name, world), world) for name in CHOSEN])
            assert [name for name, o in zip(CHOSEN, outcomes, strict=True) if o.passed] == []
            assert outside(world) == before and pool.restarts == 0
            programs, expected = zip(*(honest(n) for n in range(1, 21)), strict=True)
            assert judged(pool, programs) == list(expected)
    finally:
        for fd in held:
            os.close(fd)


@CALLERS
def test_an_attack_in_one_sandbox_changes_nothing_in_another(without, world):
    """While one is under attack the other judges on: every verdict right, no worker of it ended, nothing of it grown."""
    hasty = Sandbox(workers=1, cpu_seconds=1, wall_seconds=1.0, without=without)
    with hasty as one, Sandbox(workers=1, without=without) as other:
        programs, expected = zip(*(honest(n) for n in range(1, 21)), strict=True)
        assert judged(other, programs) == list(expected)
        pids, before = other.pids, resources(other.pids[0])
        hostile = [attack(response(name, world), world) for name in CHOSEN]
        outcomes = []
        beside = threading.Thread(target=lambda: outcomes.extend(one.run(hostile)))
        beside.start()
        while beside.is_alive():
            assert judged(other, programs) == list(expected)
        assert len(outcomes) == len(CHOSEN) and not any(o.passed for o in outcomes)
        after = resources(other.pids[0])
        assert other.pids == pids and one.restarts == other.restarts == 0
        assert after[0] == before[0] and after[1] <= before[1] + 1024


GO = """
import json, os, sys, threading
from sandbox.pool import Program, Sandbox
sources, without = json.load(sys.stdin)
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(300)]
for fd in held:
    os.set_inheritable(fd, True)
ask = lambda source: Program(source, ["Solution().f(1)"], lambda i, v: v == 918273645)
right = ask("class Solution:\\n    def f(self, n): return 918273645")
hasty = Sandbox(workers=1, without=without, cpu_seconds=1, wall_seconds=2.0)
with hasty as pool, Sandbox(workers=1, without=without) as other:
    outcomes = []
    attacks = threading.Thread(target=lambda: outcomes.extend(pool.run([ask(s) for s in sources] + [right])))
    attacks.start()
    beside = []
    while attacks.is_alive():
        beside += [o.passed for o in other.run([right] * 5)]
    print(json.dumps([pool.layers, [o.passed for o in outcomes], all(beside), pool.restarts, other.restarts]))
"""


def elsewhere(folder, names, world, without=(), **who):
    """(layers, whether each attack passed, and last an honest program) with a plain system interpreter, as somebody else, who
    holds 300 descriptors and judges right answers in another sandbox meanwhile."""
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
    (folder / "go.py").write_text(GO)
    home = folder / "home"
    home.mkdir()
    (home / "owned").write_text("mine")
    for place in (home / "owned", home):
        os.chown(place, who.get("user", 0), who.get("group", 0))
    before = [(s.st_mode, s.st_size, s.st_mtime_ns) for s in map(os.stat, (home, home / "owned"))]
    done = subprocess.run(
        [interpreter, "go.py"],
        input=json.dumps([[response(name, {**world, "home": home}) for name in names], list(without)]),
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": "/tmp"},
        text=True,
        capture_output=True,
        **who,
    )
    assert done.returncode == 0, done.stderr
    layers, passed, beside, restarts, restarts_beside = json.loads(done.stdout)
    print("layers on:", ", ".join(layers["on"]), "| off:", ", ".join(layers["off"]) or "none")
    assert beside and restarts == restarts_beside == 0
    assert (home / "owned").read_text() == "mine" and os.listdir(home) == ["owned"]
    assert [(s.st_mode, s.st_size, s.st_mtime_ns) for s in map(os.stat, (home, home / "owned"))] == before
    return layers, passed


@pytest.mark.slow
@pytest.mark.parametrize("without", [[], ["namespaces"]], ids=["all", "no-namespaces"])
def test_as_an_ordinary_user(without, world, tmp_path):
    names = [*READS, *WRITES, *PROCESSES, *NETWORK, *INSIDE]
    layers, passed = elsewhere(tmp_path, names, world, without, user=12345, group=12345, extra_groups=[])
    assert "rlimits" in layers["on"] and "unprivileged" in layers["on"]
    assert passed == [False] * len(names) + [True]


def test_root_becomes_another_user_without_namespaces(world, tmp_path):
    """The walls that a container without any privilege still has: root drops its rights in place."""
    names = ["always_equal_object", "read_dataset", "kill_trainer", "write_home", "tcp_socket", "fork_bomb"]
    layers, passed = elsewhere(tmp_path, names, world, without=["namespaces"])
    assert layers["on"]["unprivileged"].startswith("root became uid ") and "namespaces" in layers["off"]
    assert passed == [False] * len(names) + [True]
