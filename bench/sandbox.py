"""Times the grading: `python -m bench.sandbox`. Prints seconds and ratios, asserts nothing.

1. The canonical solutions of a data file, by this environment and by a fresh interpreter per program, the way of the public
   benchmark (one at a time, and as many at once as there are workers); and the same with the programs' own computing time
   taken out, which neither can change.
2. 128 rollouts of pocket problems, labels included, at several shares of responses that define the evaluator.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from faults.errors import command
from leetcode_env import LeetCodeEnv, Problem, load_problems
from loopholes import evaluated_by
from sandbox.pool import Program

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(os.environ.get("PGRPO_LEETCODE", ROOT / "../shared/leetcode/leetcode_test_medhard_sample.jsonl"))
POCKET = ROOT / "pocket" / "train.jsonl"

# What a fresh interpreter does for one program: read it and its tests, run them; the seconds that this took go to its output.
_FRESH = """
import json, sys, time
program, tests = json.load(sys.stdin)
start = time.process_time()
namespace = {}
exec(program, namespace)
for test in tests:
    exec(test, namespace)
print(time.process_time() - start)
"""


def fenced(code: str) -> str:
    """A response that is this code alone."""
    return f"```python\n{code}\n```"


def fresh_interpreter(problem: Problem) -> float:
    """CPU seconds of the canonical solution and its tests alone, in an interpreter of its own."""
    job = json.dumps([f"{problem.setup_code}\n\n{problem.canonical_solution}", list(problem.gt_answer)])
    done = subprocess.run([sys.executable, "-c", _FRESH], input=job, capture_output=True, text=True, check=True)
    return float(done.stdout)


def clocked(action: Callable[[], T]) -> tuple[T, float]:
    """(result, seconds of wall time)."""
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def cpu_seconds(env: LeetCodeEnv) -> float:
    """CPU time so far of this process, the workers and all the runs that they have reaped (Linux)."""
    tick = os.sysconf("SC_CLK_TCK")
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in ["self", *env.sandbox.pids]]
    return sum(sum(map(int, stat[11:15])) for stat in stats) / tick


def bench_canonical(problems: list[Problem], env: LeetCodeEnv, workers: int) -> None:
    """Prints how this environment compares with fresh interpreters on the canonical solutions."""
    items = [(p, fenced(p.canonical_solution), None) for p in problems]
    grades, ours = clocked(lambda: env.grade(items))
    compute, one_by_one = clocked(lambda: [fresh_interpreter(p) for p in problems])
    with ThreadPoolExecutor(workers) as threads:
        _, at_once = clocked(lambda: list(threads.map(fresh_interpreter, problems)))
    print(f"{len(problems)} canonical solutions, {sum(g.correct for g in grades)} judged correct")
    print(f"  this environment, {workers} workers       {ours:8.2f} s")
    print(f"  fresh interpreters, one at a time  {one_by_one:8.2f} s   ratio {ours / one_by_one:.2f}")
    print(f"  fresh interpreters, {workers} at once      {at_once:8.2f} s   ratio {ours / at_once:.2f}")
    print(f"  of which the programs' own computing time: {sum(compute):.2f} s of CPU, on one core")
    short = [i for i, seconds in enumerate(compute) if seconds < 1]
    _, ours = clocked(lambda: env.grade([items[i] for i in short]))
    _, fresh = clocked(lambda: [fresh_interpreter(problems[i]) for i in short])
    print(
        f"the {len(short)} that compute for less than a second: {ours:.2f} s here, {fresh:.2f} s in fresh interpreters, "
        f"one at a time, ratio {ours / fresh:.2f}"
    )


def bench_overhead(env: LeetCodeEnv, runs: int = 300) -> None:
    """Prints the cost of one run that computes nothing, here and in a fresh interpreter."""
    program = Program("class Solution:\n    def f(self): return 1", ["Solution().f()"], lambda i, v: v == 1)
    env.sandbox.run([program] * 20)
    _, ours = clocked(lambda: env.sandbox.run([program] * runs))
    job = json.dumps(["class Solution:\n    def f(self): return 1", ["assert Solution().f() == 1"]])

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", _FRESH], input=job, capture_output=True, text=True, check=True)

    _, fresh = clocked(lambda: [start() for _ in range(30)])
    ours, fresh = ours / runs, fresh / 30
    each = f"{ours * 1e3:.2f} ms here, {fresh * 1e3:.1f} ms in a fresh interpreter"
    print(f"a program that computes nothing: {each}, ratio {ours / fresh:.3f}")


def bench_pocket(problems: list[Problem], env: LeetCodeEnv, rounds: int = 5) -> None:
    """Prints the seconds to grade 128 rollouts: 16 prompts x 8 responses, right and wrong, some with an evaluator."""
    for share in (0.0, 0.3, 0.6):
        items = []
        for i in range(128):
            problem = problems[i // 8]
            code = problem.canonical_solution.replace("(x", f"({i % 8} * 0 + x") if i % 2 else problem.canonical_solution
            if (i * 37 % 128) / 128 < share:
                code += "\n\ndef run_tests():\n    " + ("pass", "return True", "print('ok')", "assert 1 == 1")[i % 4]
            items.append((problem, fenced(code), evaluated_by()))
        before = cpu_seconds(env)
        seconds = sorted(clocked(lambda: env.grade(items))[1] for _ in range(rounds))
        cpu = (cpu_seconds(env) - before) / rounds
        wall = f"{seconds[0]:.3f} s at best, {seconds[rounds // 2]:.3f} s median"
        print(f"128 pocket rollouts, {share:.0%} define the evaluator: {wall}, {cpu:.3f} s of CPU on all cores")


@dataclass
class Options:
    """With what the grading is done."""

    workers: int | None = None  # sandbox processes; by default one per core


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m bench.sandbox", description=__doc__, args=argv)
    with LeetCodeEnv(options.workers) as env:
        workers = len(env.sandbox.pids)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; walls: {', '.join(env.sandbox.layers['on'])}")
        bench_overhead(env)
        bench_pocket(load_problems(POCKET, limit=16), env)
        if SAMPLE.exists():
            bench_canonical(load_problems(SAMPLE), env, workers)
        else:
            print(f"no data file at {SAMPLE}: set PGRPO_LEETCODE for the comparison on canonical solutions")


if __name__ == "__main__":
    sys.exit(main())
