"""Soaks the sandbox: `python -m bench.soak`. Random mixes of attacks and honest programs, and what must hold all along.

No verdict of an honest program wrong, no attack judged correct, no worker replaced more often than an attack explains, no growth
of descriptors, processes, memory or files. Prints a line a round and one at the end; exits with 1 when something did not hold.
Attacks that only burn their limit are drawn rarely: they take seconds and show little.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from faults.errors import command
from sandbox.pool import Program, Sandbox
from tests.support.attack_programs import ATTACKS, BURNS

ROOT = Path(__file__).resolve().parent.parent
ROUND = 250  # programs between two looks at what has grown
BURNING = 0.005  # share of the attacks that burn their limit
TRAINER_KIB, WORKER_KIB = (
    48 << 10,
    2 << 10,
)  # what memory may grow by after the warm-up: a frame is 4 MiB, and allocators keep some

# Sources of f(n), and what it returns: each touches something that attacks go for.
HONEST = {
    "sorts": ("def f(n): return sorted((x * n for x in range(9)), reverse=True)", lambda n: [x * n for x in range(8, -1, -1)]),
    "maps": ("from collections import *\ndef f(n): return Counter('ab' * n)", lambda n: Counter("ab" * n)),
    "counts far": ("def f(n): return n ** 90 + sum(range(20000))", lambda n: n**90 + 199990000),
    "finds its folder empty": (
        "import os\ndef f(n):\n    open('x%d' % n, 'w').write('y' * n)\n"
        "    return [len(os.listdir('.')), len(os.listdir('..')), os.path.getsize('x%d' % n)]",
        lambda n: [1, 1, n],
    ),
    "has threads": (
        "from threading import *\ndef f(n):\n    seen = []\n    ts = [Thread(target=seen.append, args=(k,)) for k in range(4)]\n"
        "    for t in ts: t.start()\n    for t in ts: t.join()\n    return sorted(seen) + [n]",
        lambda n: [0, 1, 2, 3, n],
    ),
    "takes memory": ("def f(n): return len(bytearray(50_000_000)) + n", lambda n: 50_000_000 + n),
    "goes deep": ("def g(k): return k and 1 + g(k - 1)\ndef f(n): return g(800) + n", lambda n: 800 + n),
    "reads libraries": ("import json, re, heapq, bisect\ndef f(n): return json.loads('[%d]' % n)", lambda n: [n]),
    "has nothing to read": (
        "import os, sys\ndef f(n): return [sys.stdin.read(), len(os.environ) < 3, n]",
        lambda n: ["", True, n],
    ),
    "prints": ("def f(n):\n    print('x' * 10000)\n    return (n, str(n), {n: None})", lambda n: (n, str(n), {n: None})),
}  # fmt: skip


def honest(draw: random.Random) -> tuple[str, Program, bool]:
    """(name, program, whether it is right); one in four is wrong, at its last call."""
    name = draw.choice(sorted(HONEST))
    source, answer = HONEST[name]
    numbers = [draw.randrange(1, 50)]
    right = draw.random() < 0.75
    expected = [answer(n) if right else [answer(n), "not this"] for n in numbers]
    calls = [f"f({n})" for n in numbers]
    return name, Program(source, calls, lambda i, v: v == expected[i] and type(v) is type(expected[i])), right


def descendants(pid: int | str) -> list[int]:
    """Process ids below `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(child)]
    return found


def measured(pids: list[int]) -> dict[str, int]:
    """What must not grow: the trainer's and the workers' descriptors, resident KiB, processes below them, files of runs."""
    kib = {pid: int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) for pid in [os.getpid(), *pids]}
    files = 0
    for pid in pids:
        try:
            files += len(os.listdir(f"/proc/{pid}/root/run"))
        except OSError:  # another user's view; or no private root
            continue
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "worker descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "processes": sum(len(descendants(pid)) for pid in pids),
        "files": files,
        "trainer KiB": kib[os.getpid()],
        "worker KiB": max(kib[pid] for pid in pids),
    }


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What has grown beyond what it may, in words; both sides are of `measured`."""
    allowed = {"trainer KiB": TRAINER_KIB, "worker KiB": WORKER_KIB}
    return [f"{name} {before[name]} -> {after[name]}" for name in before if after[name] > before[name] + allowed.get(name, 0)]


class Soak:
    """One sandbox, and what happened in it.

    violations: what did not hold, in words. folder: an empty one, for what attacks look for."""

    def __init__(self, pool: Sandbox, folder: Path, seed: int):
        self.pool, self.draw = pool, random.Random(seed)
        self.answers = [random.SystemRandom().getrandbits(60) for _ in range(3)]
        self.dataset, home = folder / "answers.txt", folder / "home"
        home.mkdir()
        home.chmod(0o777)
        self.dataset.write_text("\n".join(map(str, self.answers)))
        self.home = home
        self.words = {"DATASET": self.dataset, "PROJECT": ROOT, "HOME": home, "TRAINER": os.getpid()}
        self.attacks: Counter[str] = Counter()
        self.honest: Counter[str] = Counter()
        self.suspects: Counter[str] = Counter()  # attacks of rounds in which a worker was replaced
        self.violations: list[str] = []

    def attack(self, name: str) -> Program:
        """The attack's program, which looks for this soak's own files. What it would have to return is nowhere in it."""
        source = ATTACKS[name]
        for word, value in self.words.items():
            source = source.replace(word, str(value))
        return Program(source, [f"Solution().f({n})" for n in (1, 2, 3)], lambda i, v: v == self.answers[i], probe="run_tests")

    def one(self) -> tuple[str, Program, bool, Counter[str]]:
        """A random program: its name, itself, whether it is right, and where it counts."""
        if self.draw.random() < 0.5:
            return *honest(self.draw), self.honest
        burns = self.draw.random() < BURNING
        name = self.draw.choice(sorted(BURNS if burns else ATTACKS.keys() - BURNS))
        return name, self.attack(name), False, self.attacks

    def round(self, count: int) -> None:
        """Run so many random programs and look at the verdicts."""
        drawn = [self.one() for _ in range(count)]
        restarts = self.pool.restarts
        outcomes = self.pool.run([program for _, program, _, _ in drawn])
        for (name, _, right, kind), outcome in zip(drawn, outcomes, strict=True):
            kind[name] += 1
            if outcome.passed != right:
                self.violations.append(f"{name}: judged {outcome.passed} ({outcome.note or 'no note'}), is {right}")
        if self.pool.restarts > restarts:
            self.suspects.update(name for name, _, _, kind in drawn if kind is self.attacks)
        if self.dataset.read_text().split() != [str(a) for a in self.answers] or os.listdir(self.home):
            self.violations.append("files outside have changed")

    def explained(self) -> dict[str, int]:
        """{attack: how often it was run} of those that end their worker, tried one by one; restarts beyond are a violation."""
        restarts, found = self.pool.restarts, {}
        for name in sorted(self.suspects):
            before = self.pool.restarts
            self.pool.run([self.attack(name)] * 2)
            if self.pool.restarts > before:
                found[name] = 2 * self.attacks[name]  # each has two chances
        if restarts > sum(found.values()):
            self.violations.append(f"{restarts} restarts, {sum(found.values())} explained by attacks")
        return found


def soak(programs: int, workers: int, seed: int) -> list[str]:
    """Runs so many programs in rounds and prints what happens; returns what did not hold, a text each."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Sandbox(workers, cpu_seconds=1, wall_seconds=1.5) as pool:
        run, baseline, done = Soak(pool, Path(folder), seed), None, 0
        pool.run(
            [run.attack(name) for name in sorted(ATTACKS.keys() - BURNS)]
        )  # the warm-up: all that allocates once has done so
        while done < programs:
            count = min(ROUND, programs - done)
            run.round(count)
            done += count
            state = measured(pool.pids)
            baseline = baseline or state
            run.violations += [f"after {done} programs: {what}" for what in grown(baseline, state)]
            print(f"{done:6d} programs, {time.monotonic() - started:5.0f} s, {pool.restarts} restarts, {state}", flush=True)
        assert baseline is not None
        restarts, explained = pool.restarts, run.explained()
        changes = ", ".join(f"{name} {baseline[name]} -> {state[name]}" for name in baseline)
        counts = f"{run.attacks.total()} attacks of {len(run.attacks)} kinds, {run.honest.total()} honest"
        causes, seconds = explained or "none", time.monotonic() - started
        verdict = f"{len(run.violations)} VIOLATIONS" if run.violations else "PASSED"
        print(f"{done} programs ({counts}), {workers} workers, seed {seed}, {seconds:.0f} s:", end=" ")
        print(f"{restarts} restarts (explained: {causes}), {changes}; {verdict}")
        return run.violations


@dataclass
class Options:
    """How long, and by which draws."""

    programs: int = 20_000  # half of them attacks
    workers: int = 4  # sandbox processes
    seed: int = 0  # of the draws, but for the attacks' secret answers


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (`faults.errors.command`): 1 where something did not hold."""
    options = tyro.cli(Options, prog="python -m bench.soak", description=__doc__, args=argv)
    violations = soak(options.programs, options.workers, options.seed)
    for violation in violations[:50]:
        print("VIOLATION:", violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
