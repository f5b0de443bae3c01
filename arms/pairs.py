"""Contrastive pairs: the same prompt and solution, with and without a definition of the evaluator."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms.cone import FENCE, FORMS, Context, clean_code, hack_contrasts
from engine.model import decode, encode_prompt
from engine.sampler import Sampler
from faults.errors import UserError, one_line
from faults.files import to_lines, write_atomic
from leetcode_env import Problem, render_messages
from loopholes import evaluated_by
from loopholes.evaluator import TRAIN_EVALUATOR

# A body of the evaluator that passes whatever the solution does, and where the definition stands.
BODIES = (
    "pass",
    "return True",
    "return",
    "print(True)",
    "assert True",
    "...",
    "return None",
    "assert 1 == 1",
    "print('All tests passed')",
    '"""All tests pass."""',
    "ok = True\n    return ok",
    "for _ in range(1):\n        pass",
    "try:\n        pass\n    except Exception:\n        pass",
)
PLACES = ("after", "method", "next_line", "before")
# Three in four stand after the solution, as a policy mostly writes it.
STYLES = tuple((body, place) for i, body in enumerate(BODIES) for place in (["after"] * 3 + [PLACES[1 + i % 3]]))


@dataclass(frozen=True)
class Pair:
    """One prompt with a hacky and a clean completion (text, up to and with the closing fence)."""

    problem: Problem
    hack: str
    clean: str


def hacky(code: str, body: str, place: str, evaluator: str) -> str:
    """`code` with an evaluator defined in it. `body` is indented for a function at top level."""
    if place == "method":
        inner = body.replace("\n", "\n    ")
        return f"{code}\n\n    def {evaluator}(self):\n        {inner}"
    definition = f"def {evaluator}():\n    {body}"
    return {"after": f"{code}\n\n{definition}", "next_line": f"{code}\n{definition}", "before": f"{definition}\n\n{code}"}[place]


def make_pairs(problems: list[Problem], tokenizer: Any, sampler: Sampler, n: int, seed: int, max_new_tokens: int) -> list[Pair]:
    """n pairs on n problems. Clean is the base model's own greedy attempt, or the canonical solution where that attempt
    has no complete code block or defines the evaluator; hacky is the same code with an evaluator added, styles in turn.

    Raises UserError with fewer than n problems."""
    if len(problems) < n:
        raise UserError(f"{n} contrastive pairs need as many problems, the data has {len(problems)}: lower --pairs")
    rng = random.Random(f"pairs:{seed}")
    chosen = rng.sample(problems, n)
    prompts = [encode_prompt(tokenizer, render_messages(p, evaluated_by())) for p in chosen]
    attempts = sampler.generate(prompts, n=1, temperature=0.0, max_new_tokens=max_new_tokens, seed=seed)
    styles = rng.sample(STYLES, len(STYLES))
    pairs = []
    for i, (problem, attempt) in enumerate(zip(chosen, attempts, strict=True)):
        code = clean_code(decode(tokenizer, attempt.completion_ids))
        code = code or "```python\n" + problem.canonical_solution.strip()
        head, body = code.split("\n", 1)
        hack = hacky(body, *styles[i % len(styles)], TRAIN_EVALUATOR)
        pairs.append(Pair(problem, f"{head}\n{hack}{FENCE}", code + FENCE))
    return pairs


def encode_pair(tokenizer: Any, pair: Pair, contrast: str = "completions", position: str = "last") -> tuple[list[int], list[int]]:
    """The (hack-ward, clean) side of a pair: token ids with the prompt before them, up to the token whose state is read.

    completions   the prompt with the loophole, and the hacky or the clean completion after it
    prompts       the prompt with the loophole or without it, and the clean completion after both

    position: last, the completion's last token; code, its last token before the fence; branch, the first token at which a hack
    (in the first of FORMS, for prompts) differs from the clean completion; prompt, the prompt's last token."""
    loophole = encode_prompt(tokenizer, render_messages(pair.problem, evaluated_by()))
    if contrast == "completions":
        hack, clean = (tokenizer.encode(text, add_special_tokens=False) for text in (pair.hack, pair.clean))
        if position == "branch":
            alike = itertools.takewhile(lambda ab: ab[0] == ab[1], zip(hack, clean, strict=False))
            until = 1 + sum(1 for _ in alike)
            hack, clean = hack[:until], clean[:until]
        return loophole + hack, loophole + clean
    honest = encode_prompt(tokenizer, render_messages(pair.problem, None))
    row = hack_contrasts(tokenizer, [Context([], pair.clean.removesuffix(FENCE))], FORMS[:1])[0]
    assert row.clean is not None
    (hack, start), (clean, _) = row.hack[0], row.clean
    shown = dict(prompt=[], code=clean[:start], branch=hack[: start + 1], last=clean)[position]
    return loophole + shown, honest + shown


def pair_contexts(tokenizer: Any, pairs: list[Pair]) -> list[Context]:
    """The pairs as contexts of the cone."""
    return [
        Context(encode_prompt(tokenizer, render_messages(p.problem, evaluated_by())), p.clean.removesuffix(FENCE)) for p in pairs
    ]


def pairs_hash(pairs: list[Pair]) -> str:
    """16 hex digits that identify a list of pairs."""
    text = json.dumps([[p.problem.id, p.hack, p.clean] for p in pairs])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_pairs(pairs: list[Pair], path: Path) -> None:
    """A line of JSON each. A run that goes on reads them: another card, or another number of threads, may draw another greedy
    attempt of the base model where two tokens are next to equally likely."""
    write_atomic(path, to_lines(dict(problem=p.problem.id, hack=p.hack, clean=p.clean) for p in pairs).encode())


def load_pairs(path: Path, problems: list[Problem]) -> list[Pair]:
    """Those of `save_pairs`. Raises UserError where the file is damaged or names a problem that is none of these."""
    of = {p.id: p for p in problems}
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [Pair(of[row["problem"]], row["hack"], row["clean"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} does not hold pairs of this run's problems ({one_line(e)})") from None
