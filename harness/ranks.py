"""Several GPUs: `torchrun --nproc-per-node N grpo.py ...`. One process is the special case in which nothing is sent.

Each rank samples and grades its share of the step's prompts, with a rollout engine of its own, and adds up its own
*unnormalised* gradient. One all-reduce a step sums it, the token count appended. The division by the global count, the
projection and the clipping come after it, on the same numbers everywhere, so the parameters stay identical on all ranks.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from faults.errors import UserError


class World:
    """The ranks of one run. By WORLD_SIZE, not by whether torch.distributed is up: vLLM starts a group of its own."""

    def __init__(self):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self.size > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            # gloo beside nccl, for what is not on the card
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    @property
    def first(self) -> bool:
        """Whether this rank logs and writes."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's contiguous part of a list. Raises UserError unless the ranks divide it."""
        if len(items) % self.size:
            raise UserError(f"{len(items)} prompts a step cannot be shared by {self.size} ranks: change --batch")
        part = len(items) // self.size
        return items[self.rank * part: (self.rank + 1) * part]

    def total(self, flat: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(flat)
        return flat

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank, whatever shape this rank's has."""
        if self.size == 1:
            return tensor
        shape = [list(tensor.shape)]
        dist.broadcast_object_list(shape, src=0)
        out = tensor.contiguous() if self.first else torch.empty(shape[0], dtype=tensor.dtype, device=tensor.device)
        dist.broadcast(out, src=0)
        return out

    def gather(self, items: list) -> list:
        """The ranks' lists one after the other, on every rank."""
        if self.size == 1:
            return items
        parts: list = [None] * self.size
        dist.all_gather_object(parts, items)
        return [x for part in parts for x in part]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
