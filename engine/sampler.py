"""What samples from the policy: prompts in, token ids and their logprobs out. Token in, token out: nothing is tokenised again.

`torch_sampler.TorchSampler` runs any Hugging Face causal LM through its own forward; `vllm_sampler.VLLMSampler` is the fast one
for GPUs. Each holds weights of its own: a sampler whose weights were not pushed samples from the old policy, and the loop sees
it in the logged ratio of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]  # (HF name, tensor)
FENCE = "\n```\n"  # the line that closes a completion's code


@dataclass
class Rollout:
    """One completion. Masks come from the lengths of these lists, never from token values (pad may equal eos)."""

    prompt_ids: list[int]
    completion_ids: list[int]  # with the eos that ended it, which is an action of the policy like any other
    logprobs: list[float]  # of each completion token, at the sampling temperature, over the whole vocabulary
    finished: bool  # False: cut at max_new_tokens
    ref_logprobs: list[float] = field(default_factory=list)  # of the same tokens under the base model: the trainer's to fill in
    logprobs_at_1: list[float] = field(default_factory=list)  # of the same at temperature 1; empty where the sampler has none

    @property
    def sequence(self) -> tuple[list[int], int]:
        """(all token ids, where the completion begins), as `engine.forward` takes it."""
        return self.prompt_ids + self.completion_ids, len(self.prompt_ids)


Ended = Callable[[int, Rollout], None]  # (place among the completions, the completion)


def unheard(_: int, __: Rollout) -> None:
    """Where nobody waits for a single completion."""


class Stop:
    """A text that ends a completion where it is complete, as an end token does. No end token is added, for none was sampled."""

    TAIL = 8  # tokens within which it stands

    def __init__(self, text: str, tokenizer: Any, vocab: int):
        """vocab: how many ids can be sampled."""
        self.text, self.tokenizer = text, tokenizer
        self.last = {i for i in range(vocab) if text[-1] in tokenizer.decode([i])}  # ids that it may end with

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether it stands at the end of a completion's ids so far, before which it was not complete."""
        return ids[-1] in self.last and self.text in self.tokenizer.decode(list(ids[-self.TAIL :]))

    def length(self, ids: Sequence[int]) -> int | None:
        """How many of the ids there are up to where it is complete; None where it is not.

        What a sampler went on to draw after it can be cut off: a completion's tokens depend on those before them alone."""
        return next((end for end in range(1, len(ids) + 1) if self.ends(ids[:end])), None)


def stop_of(name: str | None, tokenizer: Any, vocab: int) -> Stop | None:
    """What --stop says; None for "end", where end tokens alone end a completion."""
    return Stop(FENCE, tokenizer, vocab) if name == "fence" else None


class Sampler(Protocol):
    """The interface of both samplers, and of any other."""

    def generate(
        self, prompts: list[list[int]], *, n: int, temperature: float, max_new_tokens: int, seed: int,
        version: int | None = None, ended: Ended = unheard,
    ) -> list[Rollout]:  # fmt: skip
        """n completions a prompt, prompt-major, by draws that depend on `seed` alone; from no weights but those of `version`.

        ended: told of each completion as soon as it has ended, while others go on; of one that is sampled anew, again."""

    def load_weights(self, weights: Callable[[], Weights], version: int | None = None) -> None:
        """Takes new weights; a function, so that an engine that died can be filled again. version: their number."""

    def sleep(self) -> None:
        """Frees the card for the training phase; the next call of the other two wakes it."""

    def close(self) -> None:
        """Releases processes and memory."""
