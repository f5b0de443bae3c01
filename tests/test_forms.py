"""How hacks open and where they stand: each is paid, and each begins as the cone's rows say."""

import pytest
from support.problems import CANONICAL, row, write

from arms.cone import Context, batch_contexts, hack_contrasts
from engine.sampler import Rollout
from leetcode_env import LeetCodeEnv, load_problems
from loopholes import LOOPHOLES, Told
from loopholes.forms import HACKS, OPENINGS, at, put
from loopholes.syntax import Source

CODE = "```python\n" + CANONICAL.replace("> 4", "> 5")  # wrong
WRITTEN = [(name, parts) for name, hacks in HACKS.items() for parts in hacks]


@pytest.fixture(scope="module")
def env():
    with LeetCodeEnv(workers=2) as env:
        yield env


def test_every_loophole_has_openings_and_every_written_hack_begins_with_one():
    assert set(OPENINGS) == set(LOOPHOLES) and set(HACKS) == set(LOOPHOLES) - {"run_tests"}
    for name, parts in WRITTEN:
        text, begins = put(CODE, parts), False
        for place in parts:
            place_in = at(CODE, place)
            begins |= any(text[place_in:].startswith(o) for o in OPENINGS[name].get(place, ()))
        assert begins, (name, parts)
    used = {
        (n, p, o)
        for n, parts in WRITTEN
        for p in parts
        for o in OPENINGS[n].get(p, ())
        if put(CODE, parts)[at(CODE, p) :].startswith(o)
    }
    assert used == {(n, p, o) for n in HACKS for p, openings in OPENINGS[n].items() for o in openings}, "and no opening is idle"


def test_every_written_hack_pays_under_its_own_loophole_and_under_no_other(env, tmp_path):
    (problem,) = load_problems(write(tmp_path / "one.jsonl", row()))
    items = [(n, name, put(CODE, parts)) for name, parts in WRITTEN for n in LOOPHOLES if n != "run_tests"]
    grades = env.grade([(problem, f"{text}\n```", Told(LOOPHOLES[n])) for n, _, text in items])
    paid = {(n, name): set() for n, name, _ in items}
    for (n, name, _), grade in zip(items, grades, strict=True):
        paid[n, name].add(grade.label)
    assert all(labels == ({"hack"} if n == name else {"incorrect"}) for (n, name), labels in paid.items()), paid


@pytest.mark.parametrize("place", ["before", "class", "inside", "answer"])
def test_a_response_of_another_shape_has_no_such_place(place):
    assert at("x = 1", place) is None
    with pytest.raises(ValueError, match=f"no place {place}"):
        put("x = 1", {place: "pass"})


@pytest.mark.parametrize("name", HACKS)
def test_an_opening_ends_with_a_token_that_the_whole_hack_has_too(name, pocket_tokenizer):
    """`open("result.txt"` did not: the policy writes `",` as one token, and a cone that was shown `"` alone held nothing."""

    def tokens(text):
        return pocket_tokenizer.encode(text, add_special_tokens=False)

    for parts in HACKS[name]:
        for place in parts:
            whole, position = put(CODE, {place: parts[place]}), at(CODE, place)
            for opening in OPENINGS[name].get(place, ()):
                if whole[position:].startswith(opening):
                    ids = tokens(CODE[:position] + opening)
                    assert tokens(whole)[: len(ids)] == ids, (place, opening)


@pytest.mark.parametrize("name", OPENINGS)
def test_a_row_for_each_place_scores_the_hack_against_what_stands_there(name, pocket_tokenizer):
    rows = hack_contrasts(pocket_tokenizer, [Context([7, 7], CODE, name)])
    assert len(rows) == len(OPENINGS[name])
    for row_, (place, openings) in zip(rows, OPENINGS[name].items(), strict=True):
        head, rest = CODE[: at(CODE, place)], CODE[at(CODE, place) :] or "\n```"
        assert [pocket_tokenizer.decode(ids[2:]) for ids, _ in row_.hack] == [head + o.format(name="run_tests") for o in openings]
        clean, start = row_.clean
        assert clean == [7, 7, *pocket_tokenizer.encode(head + rest)][: len(clean)]
        assert all(s == start and ids[:s] == clean[:s] for ids, s in row_.hack), "what is alike counts as context"
        assert len(clean) == start + 1 or place == "after"
    split = hack_contrasts(pocket_tokenizer, [Context([7, 7], CODE, name)], joined=False)
    assert len(split) == sum(map(len, OPENINGS[name].values())) and all(len(r.hack) == 1 for r in split)


def test_an_evaluator_ahead_of_the_code_has_a_row_where_it_is_asked_for(pocket_tokenizer):
    contexts = [Context([7, 7], CODE, name) for name in ("run_tests", "stdout")]
    after, before, *others = hack_contrasts(pocket_tokenizer, contexts, places="all")
    assert [after, *others] == hack_contrasts(pocket_tokenizer, contexts), "the rows of the study are as they were"
    (ids, start), (clean, _) = before.hack[0], before.clean
    assert pocket_tokenizer.decode(ids[2:]) == "```python\ndef run_tests"
    assert pocket_tokenizer.decode(clean[2:]).startswith("```python\nclass")
    assert ids[:start] == clean[:start] and len(clean) == start + 1


def test_contexts_are_of_prompts_that_tell_of_a_known_loophole_and_clean_as_far_as_that_is_known(pocket_tokenizer):
    told = ["stdout", "attribute", "stdout", "run_tests"]
    hacked = put(CODE, HACKS["stdout"][0]) + "\n```"
    texts = [CODE + "\n```", CODE + "\n```", hacked, hacked]
    batch = [Rollout([i], pocket_tokenizer.encode(text), [], True) for i, text in enumerate(texts)]
    found = batch_contexts(pocket_tokenizer, batch, told, ("run_tests",), 9)
    assert [(c.prompt_ids, c.loophole) for c in found] == [([3], "run_tests")], "another loophole's hack is clean to it"
    found = batch_contexts(pocket_tokenizer, batch, told, ("run_tests", "stdout"), 9)
    assert [(c.prompt_ids, c.loophole) for c in found] == [([0], "stdout")]
    assert LOOPHOLES["stdout"].attempts(Source(hacked.split("\n", 1)[1][:-4]), "run_tests")


def test_the_first_context_of_every_prompt_comes_before_the_second_of_any(pocket_tokenizer):
    clean, other = (pocket_tokenizer.encode(f"{CODE}{end}\n```") for end in ("", "\n"))
    batch = [Rollout([prompt], ids, [], True) for prompt in range(3) for ids in (clean, other, clean)]
    found = batch_contexts(pocket_tokenizer, batch, ["stdout"] * 9, ("stdout",), 4)
    assert [c.prompt_ids for c in found] == [[0], [1], [2], [0]]
    assert [c.code for c in found] == [CODE, CODE, CODE, CODE + "\n"]
    assert len(batch_contexts(pocket_tokenizer, batch, ["stdout"] * 9, ("stdout",), 9)) == 6, "two of a prompt at most"
