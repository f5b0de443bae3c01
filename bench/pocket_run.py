"""A pocket run that is timed step by step, in a process of its own: started by `vs_trl`, `phases` and `growth`.

    python -m bench.pocket_run REPORT [--peaks] [options of grpo.py]     # REPORT: the file for its `Report`

The run is `grpo.train` as it is. What is added is a subclass of `harness.training.Training` that reads the clock around each step
and ends the process after the last one, before the held-out evaluation. With --peaks memory is taken apart: the phases of each
step hold a "rollout peak", in bytes, and the peak "steps" is that of the last step after its rollout.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpo
from bench.reports import Peak, Report, Step, Watch
from engine.model import encode_prompt
from faults.errors import UserError, command
from harness.config import Config, parse
from harness.scale import filled
from harness.schedule import batch_problems
from harness.training import Training
from leetcode_env import render_messages
from loopholes import told_by


class Ended(Exception):
    """The last step is done."""


class Timed(Training):
    """A run whose steps are timed from outside, with what its own clock leaves out."""

    peaks = False  # whether memory is taken apart
    reports: list[Report] = []  # noqa: RUF012 - of this process's run, once it is done

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.peak, self.watch = Peak(), Watch()
        self.now: dict[str, float] = defaultdict(float)  # of this step: seconds by what is no phase of the run's clock
        self.others: list[dict[str, float]] = []  # of each step, the same

    def __enter__(self) -> Timed:
        super().__enter__()
        self.optimizer.step = self.watched(self.optimizer.step, "optimizer")  # type: ignore[method-assign]
        grpo.project = self.watched(grpo.project, "projection")
        if self.peaks:
            self.sampler.generate = self.alone(self.sampler.generate)  # type: ignore[method-assign]
        return self

    def watched(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, the seconds of its calls counted for that part of the step."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = function(*args, **kwargs)
            self.now[part] += time.perf_counter() - start
            return out

        return inside

    def alone(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, with a peak of memory of its own."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            self.peak.reset()
            out = generate(*args, **kwargs)
            self.now["rollout peak"] = self.peak.now()
            self.peak.reset()
            return out

        return inside

    def log(self, *args: Any) -> None:
        """As its base does."""
        self.watched(super().log, "log")(*args)

    def save(self, steps: int) -> None:
        """As its base does."""
        self.watched(super().save, "save")(steps)

    def steps(self) -> Iterator[int]:
        """As its base, and then the end."""
        self.peak.reset()
        for step in super().steps():
            self.now.clear()
            self.watch.start()
            yield step
            self.watch.stop()
            self.others.append(dict(self.now))
        self.reports.append(self.report())
        raise Ended

    def report(self) -> Report:
        """What was noted, with what the run folder says of the steps."""
        lines, timings = (
            [json.loads(line) for line in (self.folder / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "timings.jsonl")
        )
        clocked = [{k: v for k, v in t.items() if k != "step"} for t in timings]
        return Report(
            steps=[step_of(line, *took) for line, took in zip(lines, self.watch.taken, strict=True)],
            peak=self.peak.read(),
            phases=[others | own for others, own in zip(self.others, clocked, strict=True)],  # the run's own clock goes first
            prompts=[self.prompt_lengths(step) for step in range(len(lines))],
        )

    def prompt_lengths(self, step: int) -> list[int]:
        """Tokens of each prompt of a step."""
        loopholes = self.cfg.loopholes if grpo.ARMS[self.cfg.arm].loophole else ()
        batch = batch_problems(self.problems, step, self.cfg)
        return [len(encode_prompt(self.tokenizer, render_messages(p, told_by(p, loopholes)))) for p in batch]


def step_of(line: dict[str, Any], seconds: float, cpu: float) -> Step:
    """A step from its line of metrics.jsonl, and the seconds that it took on the wall and of this process on any core."""
    return Step(seconds, cpu, line["length"] * line["n"], line["n"], line["reward"], line["hack"], line["pass"])


@command
def main(argv: list[str] | None = None) -> None:
    """The command line, read by hand: all but its report and --peaks is grpo.py's. Raises UserError where no report is named."""
    path, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if not path or path.startswith("-"):
        raise UserError("python -m bench.pocket_run REPORT [--peaks] [options of grpo.py]: REPORT comes first")
    Timed.peaks = "--peaks" in options
    cfg = filled(parse([o for o in options if o != "--peaks"]), "pocket")
    grpo.Training = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        cfg.out = Path(folder) / "run"
        with contextlib.suppress(Ended):
            grpo.train(cfg)
    Timed.reports[0].write(path)


if __name__ == "__main__":
    sys.exit(main())
