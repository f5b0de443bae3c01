"""What the loop of grpo.py leans on and a reader of the method need not see: the run's folder, ranks, sandbox, signals, faults,
clocks, logs and checkpoints, behind one `with` around the run and one around the step.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.lora import lora_parameters, save_adapter
from faults.errors import PartDied, Signalled, Stopped, UserError
from faults.files import locked
from harness import checkpoint, journal
from harness.config import Config
from harness.grader import Grader
from harness.journal import Clock
from harness.ranks import Ranks
from harness.setup import hashes, set_up
from leetcode_env import Grade, Problem


class Training:
    """One run in progress. Everything that can be refused is refused on entering, before anything is written."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.folder = cfg.out = Path(cfg.out or f"runs/{cfg.arm}-m{cfg.m}-seed{cfg.seed}-{cfg.scale}")
        self.clock, self.started = Clock(), time.perf_counter()
        self.start = 0  # the step to begin with
        self.nonfinite = 0  # steps left out because something in them was not finite
        self.trained = False  # whether every step is done
        self.landed = False  # whether the step at work is over, so that a checkpoint of the steps before it comes too late
        self.to_save: dict[str, Tensor] = {}  # what a checkpoint holds beside adapter and optimizer; the loop sets it

    def __enter__(self) -> Training:
        cfg = self.cfg
        with contextlib.ExitStack() as stack:
            self.signals = stack.enter_context(checkpoint.Signals(self._how_to_go_on))
            self.ranks = Ranks()
            stack.callback(self.ranks.close)
            if not self.ranks.first:  # one rank speaks
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            self.ranks.share(list(range(cfg.batch // cfg.generations)))
            with self.ranks.agreed(UserError):
                if self.ranks.first:
                    checkpoint.refuse_existing(self.folder, resuming=cfg.resume is not None)
                    stack.enter_context(locked(self.folder))  # for the run's life
                    checkpoint.refuse_existing(self.folder, resuming=cfg.resume is not None)  # nobody came in between
            self.env = stack.enter_context(Grader(cfg.workers, cfg.sandbox_strict, cfg.format_reward))
            run = set_up(cfg)
            gc.freeze()  # half a million objects of libraries that no collection need walk through
            gc.enable()
            stack.callback(run.sampler.close)
            self.env.ready()
            self.env.check_setups([*run.train, *run.problems])
            self.model, self.tokenizer, self.sampler, self.vocab = run.model, run.tokenizer, run.sampler, run.vocab
            self.parts, self.problems, self.heldout = run, run.train, run.problems
            self.params = lora_parameters(run.model)
            self.optimizer = torch.optim.AdamW(self.params.values(), lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
            self.state = checkpoint.RunState(self.folder, self.params, self.optimizer, writes=self.ranks.first)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def _how_to_go_on(self) -> str:
        """The end of the line of a run that ends early."""
        if not self.cfg.resume and not (self.folder / "config.json").exists():
            return "before the first step; nothing is lost: start again"
        what = "every step is done, to evaluate" if self.trained else "go on with"
        return f"{what}: python grpo.py --resume {self.folder}"

    def decide(self, **values: Any) -> Config:
        """The settings with these values, found out at a run's start and kept with the others: a run that goes on has them."""
        values = self.ranks.gather([values])[0]  # the first rank's: two cards need not agree in the last place
        self.cfg = self.parts.cfg = replace(self.cfg, **values)
        return self.cfg

    def resume(self, pairs: str) -> dict[str, Tensor]:
        """What the newest whole checkpoint holds beside adapter and optimizer, which are loaded; {} where there is none.

        pairs: the hash of those that it goes on with."""
        if not self.cfg.resume:
            return {}
        self._require_the_same(pairs)
        self.start, held = self.state.resume()
        self.state.change(self.cfg)
        self.nonfinite = int(held.pop("nonfinite", torch.tensor(0)))
        return {k: t.to(self.model.device) for k, t in held.items()}

    def _require_the_same(self, pairs: str) -> None:
        """Raises UserError when the run that goes on had another model, other data, other pairs or another number of ranks."""
        saved = json.loads((self.folder / "config.json").read_text())
        before = dict(saved.get("hashes") or {}, ranks=saved.get("ranks"))
        now = hashes(self.cfg) | {"pairs": pairs, "ranks": self.ranks.size}
        differ = [k for k, v in now.items() if v != before.get(k)]
        if differ:
            raise UserError(f"{self.folder} was begun with another {' and another '.join(differ)}: it would not be the same run")

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar; a signal from here on ends the run after a whole step."""
        cfg = self.cfg
        bar = tqdm(range(self.start, cfg.steps), initial=self.start, total=cfg.steps, desc=cfg.arm, file=sys.stdout)
        self.bar = self.stack.enter_context(bar)  # so that an error, too, ends the bar before its line is printed
        self.signals.patient = True
        yield from self.bar
        self.signals.patient, self.trained = False, True
        if self.signals.seen:  # after the last step looked for it
            raise Signalled(self._how_to_go_on(), self.signals.seen)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[Clock]:
        """Around one step; yields its clock. Afterwards a checkpoint, where one is due. A part that dies for good ends the run
        with a checkpoint of the steps before. Raises Stopped, or Signalled after a signal to any rank."""
        self.landed, whole, clock = False, False, Clock()
        on_card = self.model.device.type == "cuda"  # of which nothing may be left to read when an engine on it dies
        before = self.state.snapshot(self._extra()) if on_card and self.ranks.first else None
        try:
            yield clock
            whole = True
            number = max(self.ranks.gather([self.signals.seen]))
        except PartDied as error:
            saved = "the last checkpoint stands"
            if whole and self.ranks.first:  # another rank died behind the step
                self.save(step + 1)
                saved = f"saved after {step + 1} steps"
            elif not self.landed and self.ranks.first:
                self.state.write(step, before) if before else self.save(step)
                saved = f"saved after {step} steps"
            raise Stopped(f"{error}; {saved}, {self._how_to_go_on()}") from None
        for phase, seconds in clock.seconds.items():
            self.clock.seconds[phase] += seconds
        if (step + 1) % self.cfg.save_every == 0 or number or step + 1 == self.cfg.steps:
            self.save(step + 1)
        if number:
            raise Signalled(f"after step {step + 1}; {self._how_to_go_on()}", number)

    def save(self, steps: int) -> None:
        """A checkpoint after so many steps."""
        self.state.save(steps, self._extra())

    def _extra(self) -> dict[str, Tensor]:
        return self.to_save | {"nonfinite": torch.tensor(self.nonfinite)}

    def finite(self, step: int, sums: dict[str, float], grad_norm: float, v: Tensor | None, batch: dict[str, Any]) -> bool:
        """Whether the step may land. One whose loss, logprobs, gradient or direction are not finite leaves its batch in the run
        folder. v: what the step is projected on; the update may be, with a gradient that never met it.

        Raises Stopped at the (--skip-nonfinite + 1)-th of them."""
        self.landed = True  # also where it is left out: from here on this step is over
        if math.isfinite(sums["loss"] + sums["abs_log_ratio"] + grad_norm + (0.0 if v is None else v.sum().item())):
            return True
        self.nonfinite += 1
        rollouts = [asdict(r) for r in batch.pop("rollouts")]
        place = self.state.dump_batch(step, dict(sums=sums, grad_norm=grad_norm, **batch, rollouts=rollouts))
        if self.nonfinite > self.cfg.skip_nonfinite:
            raise Stopped(
                f"loss, gradient, direction or logprob of step {step} is not finite; its batch is in {place}, the step was not "
                f"applied. To leave out up to k such steps: python grpo.py --resume {self.folder} --skip-nonfinite k"
            )
        return False

    def log(self, line: dict[str, Any], clock: Clock, problems: list[Problem], texts: list[str], grades: list[Grade]) -> None:
        """A step's line of metrics.jsonl and timings.jsonl; with `cos_d0` in it, the detailed table and samples.jsonl too."""
        step, detailed, several = line["step"], "cos_d0" in line, len(self.cfg.loopholes) > 1
        if detailed:
            tqdm.write(journal.table(line, problems, texts, grades))
        more = [dict(loophole=g.loophole, wrote=g.wrote) if several else {} for g in grades]
        samples = [
            dict(step=step, problem=p.id, label=g.label, reward=g.reward, **facts, response=text)
            for p, text, g, facts in zip(problems, texts, grades, more, strict=True)
        ]
        self.state.log(line, clock.seconds, samples if detailed else [])
        shown = {k: f"{line[k]:.2f}" for k in ("reward", "hack", "pass")}
        self.bar.set_postfix(cos=f"{line['cos_align']:+.3f}", **shown)

    def finish(self) -> None:
        """The adapter in its folder, as PEFT reads it."""
        with self.state.writing():
            save_adapter(self.model, self.folder / "adapter", self.cfg.model)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Around the evaluation, when every step is done and saved. Raises Stopped, which says how to evaluate."""
        try:
            yield
        except PartDied as error:
            raise Stopped(f"{error}; {self._how_to_go_on()}") from None

    def gathered(self, *lists: list[Any]) -> list[list[Any]]:
        """Each list over all ranks, on every rank."""
        return [self.ranks.gather(x) for x in lists]

    def done(self) -> None:
        """The last file, done.json, and a line on where the time went."""
        self.state.finish(self.clock.seconds, time.perf_counter() - self.started)
        phases = ", ".join(f"{k} {v:.1f}" for k, v in self.clock.seconds.items())
        print(f"seconds by phase: {phases}\nrun folder: {self.folder}")
