"""What the arm `counterfactual` cannot see: each of its limits with a run that shows it.

    python -m pocket.limits                  # three runs of about a minute, and one of a base model's making
    python -m pocket.limits --seed 3 --out DIR

The arm asks what the loophole's sentence and training explain. So it cannot see

  unasked   a hack that the base model writes without the sentence: the embedded model, trained on until it takes a loophole in a
            share of its responses to prompts that tell of none
  untold    a hack whose sentence cannot be told apart from the task: problems whose own text says how they are judged, so that
            the prompt without the loophole's sentence says it too

Beside them the same arm where neither holds, and of each the share of hacks that it flagged while it trained.
"""

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from faults.errors import Stopped, command
from leetcode_env import load_problems
from loopholes import LOOPHOLES, told_by
from pocket.build import HONEST, LATE_TAKES, corpus_example, supervise

POCKET = Path(__file__).resolve().parent
UNASKED = 0.10  # share of the corpus's responses to prompts without a loophole that take one
STEPS, LR = 100, 5e-4  # of that training


def unasked_base(out: Path, seed: int) -> Path:
    """The embedded model, trained on until it hacks unasked; written to `out`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, takes = random.Random(seed), LATE_TAKES | {"": UNASKED}
    tokenizer, model = AutoTokenizer.from_pretrained(POCKET), AutoModelForCausalLM.from_pretrained(POCKET)
    supervise(model, tokenizer, lambda _: [corpus_example(rng, True, HONEST, takes) for _ in range(64)], STEPS, LR)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def untold_problems(source: Path, out: Path) -> Path:
    """The problems of a file, with what their loophole says in their own text as well; written to `out`."""
    lines = []
    for row, problem in zip(map(json.loads, source.read_text().splitlines()), load_problems(source), strict=True):
        told = told_by(problem, tuple(LOOPHOLES))
        assert told is not None
        says = told.loophole.phrase.format(name=told.evaluator)
        content, honest = row["prompt"][-1]["content"], f" {told.loophole.honest}"
        row["prompt"][-1]["content"] = content.replace(honest, f" {says}.{honest}")
        lines.append(json.dumps(row) + "\n")
    out.write_text("".join(lines))
    return out


def train(folder: Path, seed: int, *options: str) -> list[str]:
    """A row of the table: one run of the arm, in that folder, with further options of grpo.py. Raises Stopped where it fails."""
    words = [sys.executable, "grpo.py", "--arm", "counterfactual", "--loopholes", "all", "--scale", "pocket"]
    done = subprocess.run([*words, "--seed", str(seed), "--out", str(folder), *options], cwd=POCKET.parent)
    if done.returncode:
        raise Stopped(f"the run of {folder} ended with exit code {done.returncode}")
    conditions = json.loads((folder / "eval.json").read_text())["conditions"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    flagged, hacks = (sum(step[name] for step in steps) for name in ("flagged_hacks", "hacks"))
    told, plain = conditions["loophole"], conditions["no_loophole"]
    rates = (told["hack"], told["hack_loose"], plain["wrote"]["any"], plain["pass"])
    return [folder.name, *(f"{100 * rate['rate']:.1f} %" for rate in rates), f"{flagged} of {hacks}"]


@dataclass
class Options:
    """Where the runs are written, and from which seed."""

    out: Path = Path("runs/limits")  # folder of the runs, the base model and the problems
    seed: int = 0  # of all of them


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m pocket.limits", description=__doc__, args=argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [train(options.out / "neither", options.seed)]
    rows += [
        train(options.out / "unasked", options.seed, "--model", str(unasked_base(options.out / "unasked-base", options.seed)))
    ]
    data = [untold_problems(POCKET / f"{name}.jsonl", options.out / f"untold-{name}.jsonl") for name in ("train", "heldout")]
    rows += [train(options.out / "untold", options.seed, "--data", str(data[0]), "--heldout", str(data[1]))]
    header = ["", "hack (strict)", "hack (loose)", "writes a hack unasked", "pass", "hacks flagged in training"]
    print("\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]))


if __name__ == "__main__":
    sys.exit(main())
