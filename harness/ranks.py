"""Several GPUs: `torchrun --nproc-per-node N grpo.py ...`. One process is the special case in which nothing is sent.

Each rank samples and grades its share of the step's prompts, with a rollout engine of its own, and adds up its own
*unnormalised* gradient. An all-reduce a step sums it. The division by the global token count, the projection and the clipping
come after it, on the same numbers everywhere, so the parameters stay identical on all ranks.

A signal lets the step end first, and torchrun kills its processes 30 s after it passed one on: where a step takes longer, start
it with `--shutdown-timeout 180`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from faults.errors import PartDied, UserError, one_line

T = TypeVar("T")


class Ranks:
    """The ranks of one run. By WORLD_SIZE, not by whether torch.distributed is up: vLLM starts a group of its own."""

    def __init__(self) -> None:
        """Raises UserError for an environment that is not torchrun's, and when the ranks do not find each other."""
        env = {name: os.environ.get(name) or usual for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))}
        if not all(text.isdecimal() for text in env.values()) or not int(env["RANK"]) < int(env["WORLD_SIZE"]):
            said = " ".join(f"{name}={text}" for name, text in env.items())
            raise UserError(f"{said} in the environment: start several ranks with torchrun, or unset them")
        self.rank, self.size, local = map(int, env.values())
        if self.size > 1:
            cuda = torch.cuda.is_available()
            try:
                if cuda:
                    torch.cuda.set_device(local)
                # gloo beside nccl, for what is not on the card
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            except (RuntimeError, ValueError) as e:
                raise UserError(f"the {self.size} ranks do not come together ({one_line(e)}): start them with torchrun") from None

    @property
    def first(self) -> bool:
        """Whether this rank logs and writes."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """This rank's contiguous part of a list. Raises UserError unless the ranks divide it."""
        if len(items) % self.size:
            raise UserError(f"{len(items)} prompts a step cannot be shared by {self.size} ranks: change --batch")
        return self.part(items)

    def part(self, items: list[T]) -> list[T]:
        """This rank's contiguous part of a list of any length; the parts in order are the list."""
        ends = [len(items) * r // self.size for r in (self.rank, self.rank + 1)]
        return items[ends[0] : ends[1]]

    def total(self, flat: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.size > 1:
            with self._peers():
                dist.all_reduce(flat)
        return flat

    def from_rank(self, tensor: Tensor, source: int = 0) -> Tensor:
        """That rank's tensor, on every rank, whatever shape this rank's has."""
        if self.size == 1:
            return tensor
        shape: list[Any] = [list(tensor.shape)]
        with self._peers():
            dist.broadcast_object_list(shape, src=source)
            mine = self.rank == source
            out = tensor.contiguous() if mine else torch.empty(shape[0], dtype=tensor.dtype, device=tensor.device)
            dist.broadcast(out, src=source)
        return out

    def rows(self, part: Tensor) -> Tensor:
        """The ranks' rows one after the other, [n, ...], on every rank."""
        return torch.cat([self.from_rank(part, r) for r in range(self.size)]) if self.size > 1 else part

    def gather(self, items: list[T]) -> list[T]:
        """The ranks' lists one after the other, on every rank."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        with self._peers():
            dist.all_gather_object(parts, items)
        return [x for part in parts for x in part]

    @contextlib.contextmanager
    def agreed(self, kind: type[Exception] = PartDied) -> Iterator[None]:
        """Around what can fail on this rank alone: an error of that kind here is raised on every rank."""
        failure = ""
        try:
            yield
        except kind as error:
            if self.size == 1:
                raise
            failure = f"{error} (rank {self.rank})"
        if failures := [text for text in self.gather([failure]) if text]:
            raise kind(failures[0])

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        """Around what waits for the other ranks. One that has ended without a word is a part of this run that died."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PartDied(f"another rank of this run has ended ({str(error).splitlines()[0][:120]})") from None

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1:
            dist.destroy_process_group()
