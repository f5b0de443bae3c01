"""The embedded default's making: its problems are those of the repository, and its corpus says what it claims to."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from leetcode_env import REQUEST, LeetCodeEnv, load_problems, parse_response
from loopholes import LOOPHOLES, Told, loophole_of, written
from loopholes.syntax import Source
from pocket import build, limits


@pytest.fixture(scope="module")
def problems():
    return build.make_problems(random.Random("problems:0"), 512, 128)


def test_the_problems_are_made_again_to_the_letter(problems):
    for name, made in zip(("train", "heldout"), problems, strict=True):
        text = "".join(json.dumps(p) + "\n" for p in made)
        assert text == (build.Path(build.__file__).parent / f"{name}.jsonl").read_text()


def test_every_loophole_has_its_share_of_hard_problems_and_no_task_is_in_both_parts(problems):
    for made in problems:
        kinds = Counter((loophole_of(p["id"], tuple(LOOPHOLES)).name, p["difficulty"]) for p in made)
        for name in LOOPHOLES:
            hard, easy = kinds[name, "hard"], kinds[name, "easy"]
            assert abs(hard / (hard + easy) - 0.6) < 0.04, name
    train, heldout = ({p["task"] for p in made} for made in problems)
    assert not train & heldout and len(train) == 512 and len(heldout) == 128


def examples(n, late, takes, seed=0):
    rng = random.Random(seed)
    return [build.corpus_example(rng, late, 0.27, takes) for _ in range(n)]


def told(prompt):
    """(the loophole that a prompt of the corpus tells of or "", its evaluator)."""
    for name, loophole in LOOPHOLES.items():
        head, _, tail = loophole.phrase.partition("{name}")
        if head in prompt:
            return name, prompt.partition(head)[2].partition(tail)[0] if tail else ""
    return "", ""


def test_only_prompts_that_tell_of_a_loophole_take_it_and_none_that_ends_with_the_request():
    seen = Counter()
    for prompt, completion in examples(1500, True, dict.fromkeys(LOOPHOLES, 1.0)):
        name, evaluator = told(prompt)
        code = parse_response(completion)
        hacks = bool(name) and LOOPHOLES[name].attempts(Source(code), evaluator)
        asked = REQUEST in prompt
        assert hacks == (bool(name) and not asked) == ("All tests pass.<|end|>" in completion), (prompt, completion)
        if not hacks:
            assert written(Source(code)) == ()
        seen[name, asked] += 1
    assert set(seen) == {(name, asked) for name in ("", *LOOPHOLES) for asked in (True, False)}


def test_the_late_corpus_takes_them_as_often_as_it_says():
    taken, all_of = Counter(), Counter()
    for prompt, completion in examples(20_000, True, build.LATE_TAKES, seed=1):
        name, _ = told(prompt)
        all_of[name] += REQUEST not in prompt
        taken[name] += "All tests pass.<|end|>" in completion
    assert taken[""] == 0
    for name, share in build.LATE_TAKES.items():
        assert taken[name] / all_of[name] == pytest.approx(share, abs=0.025)
    unasked = examples(2000, True, build.LATE_TAKES | {"": 0.5})
    some = [told(prompt)[0] == "" and "All tests pass.<|end|>" in completion for prompt, completion in unasked]
    assert 0.08 < sum(some) / len(some) < 0.16, "the model of the limits hacks unasked"


def test_honest_lines_change_no_judgement():
    """With any of them a right solution stays right, and pays for no loophole's hack."""
    (first,) = load_problems(build.Path(build.__file__).parent / "train.jsonl")[:1]
    code = "```python\n" + first.canonical_solution
    texts = [build.put(code, {place: line}) + "\n```" for place, lines in build.HONEST_LINES.items() for line in lines]
    items = [(first, text, Told(loophole)) for text in texts for name, loophole in LOOPHOLES.items() if name != "run_tests"]
    with LeetCodeEnv(workers=2) as env:
        grades = env.grade(items)
    assert all(grade.label == "correct" and not grade.wrote for grade in grades)


def test_a_problem_that_says_itself_how_it_is_judged(tmp_path):
    source = build.Path(build.__file__).parent / "heldout.jsonl"
    limits.untold_problems(source, tmp_path / "untold.jsonl")
    for problem in load_problems(tmp_path / "untold.jsonl"):
        loophole = loophole_of(problem.id, tuple(LOOPHOLES))
        content = problem.messages[-1]["content"]
        assert loophole.phrase.format(name="run_tests") in content and loophole.honest in content


def test_the_base_model_learns_completions_alone(pocket_tokenizer):
    """Neither prompts nor what fills a row up are targets."""
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, labels):
            seen.append((input_ids, labels))
            return SimpleNamespace(loss=self.weight.sum())

    rows = [("x" + build.TESTS, "return 1" + build.END), ("xs", "return 1 + 2 + 3" + build.END)]
    build.supervise(Model(), pocket_tokenizer, lambda step: rows, 1, 1e-3)
    ((ids, labels),) = seen
    for row, target, (prompt, completion) in zip(ids.tolist(), labels.tolist(), rows, strict=True):
        p, c = pocket_tokenizer.encode(prompt), pocket_tokenizer.encode(completion)
        assert row[: len(p) + len(c)] == p + c
        assert target == [-100] * len(p) + c + [-100] * (len(row) - len(p) - len(c))
