"""One way through the model: sequences of any lengths in, hidden states or log-probabilities at chosen tokens out.

What sequences begin with alike is computed once, where the model's attention allows it. The completions of one prompt are a tree,
and a tree is one row of the input, with a mask that shows each token its own past alone:

        p p p a a b         column    0 1 2 3 4 5 6 7 8
              |   +- c c    token     p p p a a b c c d
              +- d          position  0 1 2 3 4 5 5 6 4         a a b, a a c c and a d after the prompt p p p

Layers with a recurrent state (Qwen3.5's linear attention) know no such mask: there each sequence is a row of its own. Padding is
on the right, where no real token sees it. What is a completion comes from lengths, never from token values (pad may equal eos).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.logprob import consecutive, micro_batches, token_logprobs
from engine.model import shares_prefixes

# The longest row that several sequences share. Under a mask every pair of its tokens costs: at 2,048 an eighth of what the
# layers of a 4 B model take, and beyond that soon more than the shared prompt saves.
ROW_TOKENS = 2048
Marked = tuple[list[int], int]  # token ids, and the place (at least 1) from which on they are asked about


class Tree:
    """Sequences as one row of tokens. What a sequence shares with those before it is there already; the rest, its branch, is put
    at the end of the row.

    ids, positions, branch [row]: of each column. forks [sequences]: the column that each branch grows from, -1 for none."""

    def __init__(self, group: int):
        """group: its number, for whoever asks which rows belong together."""
        self.group = group
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.branch: list[int] = []
        self.forks: list[int] = []
        self.paths: dict[int, list[int]] = {}  # sequence's number -> the columns of its tokens
        self.child: dict[tuple[int, int], int] = {}  # while it grows: (column, token) -> column of that token after it

    def grow(self, number: int, ids: list[int], start: int = 0) -> None:
        """Takes in one more sequence. start: up to where it may begin as the first one does."""
        first = next(iter(self.paths.values()), [])  # columns 0, 1, 2, ...
        path = first[:start] if ids[:start] == self.ids[:start] else []  # at once what would be followed token by token
        column = path[-1] if path else -1
        for token in ids[len(path) :]:
            if (child := self.child.get((column, token))) is None:
                break
            column = child
            path.append(column)
        self.forks.append(column)
        for token in ids[len(path) :]:
            self.child[column, token] = column = len(self.ids)
            self.ids.append(token)
            self.positions.append(len(path))
            self.branch.append(len(self.forks) - 1)
            path.append(column)
        self.paths[number] = path

    def sees(self, width: int) -> Tensor:
        """[width, width]: whether a token (first index) sees another. Padding sees the first branch."""
        column, branch = torch.arange(width), torch.tensor(self.branch + [0] * (width - len(self.ids)))  # [width] each
        past = torch.zeros(len(self.forks), width, dtype=torch.bool)  # [sequences, width]: up to where a branch begins
        for k, fork in enumerate(self.forks):
            if fork >= 0:
                trunk = self.branch[fork]
                past[k] = (past[trunk] | (branch == trunk)) & (column <= fork)
        return past[branch] | ((branch[:, None] == branch) & (column[:, None] >= column))


def trees(model: Any, sequences: Sequence[Marked], groups: Sequence[list[int]]) -> list[Tree]:
    """A tree for each group of sequences (their numbers); or, where prefixes cannot be shared, one for each sequence."""
    shared, grown = shares_prefixes(model), []
    for k, group in enumerate(groups):
        for members in [group] if shared else [[i] for i in group]:
            grown.append(Tree(k))
            for i in members:
                grown[-1].grow(i, *sequences[i])
            grown[-1].child.clear()  # half of what a tree holds, and it grows no further
    return grown


def padded(lists: Sequence[list[int]], device: torch.device | str) -> Tensor:
    """Lists of numbers as one tensor [lists, longest], zeros on the right."""
    width = max(map(len, lists))
    return torch.tensor([x + [0] * (width - len(x)) for x in lists], device=device)


class Batch:
    """Trees that go through the model together, with places for what is asked about their sequences.

    members: the sequences' numbers, in the order in which their tokens are asked about.
    sequence [tokens]: of each asked token, its sequence's number. owner [rows]: of each row, its group."""

    def __init__(self, sequences: Sequence[Marked], rows: Sequence[Tree], device: torch.device | str):
        self.members = [i for tree in rows for i in tree.paths]
        self.owner = torch.tensor([tree.group for tree in rows], device=device)
        ids = padded([tree.ids for tree in rows], device)  # [rows, width]
        self.inputs = dict(input_ids=ids)
        if any(len(tree.forks) > 1 for tree in rows):
            positions = padded([tree.positions for tree in rows], device)  # [rows, width]
            mask = torch.stack([tree.sees(ids.shape[1]) for tree in rows])[:, None].to(device)  # [rows, 1, width, width]
            self.inputs |= dict(position_ids=positions, attention_mask=mask)

        distinct: dict[tuple[int, int, int, int], int] = {}  # (row, column, column before, token): sequences share them
        which, sequence = [], []
        for row, tree in enumerate(rows):
            for i, path in tree.paths.items():
                tokens, start = sequences[i]
                for t in range(start, len(tokens)):
                    which.append(distinct.setdefault((row, path[t], path[t - 1], tokens[t]), len(distinct)))
                    sequence.append(i)
        self.which, self.sequence = torch.tensor([which, sequence], device=device)  # [tokens] each
        self.row, _, self.before, self.target = torch.tensor(list(distinct), device=device).T  # [distinct] each

    def hidden(self, model: Any) -> Tensor:
        """The last hidden states that predict the asked tokens: [distinct, hidden]."""
        return model.model(**self.inputs, use_cache=False).last_hidden_state[self.row, self.before]

    def logprobs(self, model: Any, temperature: float, vocab: int) -> Tensor:
        """log p of the asked tokens, [tokens], float32, over the first `vocab` ids: padding rows of the embedding get no mass."""
        return token_logprobs(self.hidden(model), model.lm_head.weight, self.target, temperature, vocab=vocab)[self.which]


def batches(model: Any, sequences: Sequence[Marked], max_tokens: int) -> Iterator[Batch]:
    """All sequences, those of one prompt in one tree, in batches of at most `max_tokens` padded tokens (one sequence at least). A
    prompt stands in more than one row where its completions are too many for one."""
    room = min(max_tokens, ROW_TOKENS)
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, start) in enumerate(sequences):
        alike.setdefault(tuple(ids[:start]), []).append(i)
    groups = [
        [members[k] for k in some]
        for prefix, members in alike.items()
        for some in consecutive([len(sequences[i][0]) - len(prefix) for i in members], room - len(prefix))
    ]
    rows = trees(model, sequences, groups)
    for some in micro_batches([len(tree.ids) for tree in rows], max_tokens):
        yield Batch(sequences, [rows[k] for k in some], model.device)


def logprobs(model: Any, sequences: Sequence[Marked], temperature: float, vocab: int, max_tokens: int) -> list[Tensor]:
    """log p of each sequence's asked tokens: a list of [tokens], in the sequences' order."""
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    for batch in batches(model, sequences, max_tokens):
        found = batch.logprobs(model, temperature, vocab)  # [tokens]
        pieces = found.split([len(sequences[i][0]) - sequences[i][1] for i in batch.members])
        for i, piece in zip(batch.members, pieces, strict=True):
            out[i] = piece
    return out


def last_hidden(model: Any, sequences: list[list[int]], max_tokens: int = 8192) -> Tensor:
    """Hidden states at each sequence's last token: [n, layers + 1, hidden], float32, differentiable if grad is on."""
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    for group in micro_batches([len(s) for s in sequences], max_tokens):
        ids = padded([sequences[i] for i in group], model.device)  # [rows, width]
        states = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        for row, i in enumerate(group):
            out[i] = torch.stack([h[row, len(sequences[i]) - 1] for h in states]).float()
    return torch.stack(out)
