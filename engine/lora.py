"""Hand-written LoRA (Hu et al. 2021, arXiv 2106.09685), and the flat view of its parameters that projection needs.

                      x [.., in]
                      |        |
       frozen W [out, in]     A [r, in]   float32, Kaiming-uniform
                      |        |
                      |       B [out, r]  float32, zero
                      |        | * alpha / r
                      +---(+)--+
                           |
                      y [.., out]

The flat view: theta in R^P is every A and B, in the order of the model's modules, one after the other. `slices` says
which part of it is which tensor. With the adapter off the model is the base model: the reference model of the KL term
costs no second copy. Files are in PEFT's adapter format, so PEFT and vLLM load them as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from faults.errors import UserError

# Every linear of the decoder but lm_head, for Qwen3 and for both layer kinds of Qwen3.5.
TARGETS = r"(.*\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_(qkv|z|b|a)|out_proj)|mlp\.(gate|up|down)_proj)"


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, with W frozen in any dtype and A, B in float32."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale, self.on = base, alpha / r, True
        self.rows: tuple[Tensor, Tensor, Tensor] | None = None  # see `per_example`
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform_(a=sqrt(5)), as in PEFT
        a = (torch.rand(r, base.in_features, generator=generator) * 2 - 1) * bound
        self.A = nn.Parameter(a.to(base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    @property
    def weight(self) -> Tensor:
        """The frozen base weight [out, in]: some model code looks at a linear's `weight` for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> y [.., out], in the dtype of x."""
        y = self.base(x)
        if not self.on:
            return y
        if self.rows is not None:
            return y + _PerExample.apply(x, self.A, self.B, self.scale, self.rows)
        # The products run in the base's dtype; the gradients of A and B arrive, and add up, in float32.
        h = F.linear(x, self.A.to(x.dtype))  # [.., r]
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.B.to(x.dtype).T, alpha=self.scale).view_as(y)

    def merged(self) -> Tensor:
        """W + (alpha / r) B A as a new tensor [out, in] in W's dtype; the training weights are not touched.

        Merging and un-merging in place by adding and subtracting drifts, because (W + D) - D is not W in floats."""
        with torch.no_grad():
            return (self.base.weight.float() + self.scale * self.B @ self.A).to(self.base.weight.dtype)


def inject(model: nn.Module, r: int, alpha: float, seed: int, targets: str = TARGETS) -> nn.Module:
    """Freezes `model` and puts a LoRALinear at every nn.Linear whose full name matches `targets`. In place.

    Raises UserError when no module matches or r < 1."""
    if r < 1:
        raise UserError(f"LoRA rank must be at least 1, not {r}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(targets, n)]
    if not names:
        raise UserError(f"no linear layer of {type(model).__name__} matches the LoRA pattern {targets}")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, leaf, LoRALinear(getattr(parent, leaf), r, alpha, generator))
    return model


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Full HF module name -> LoRALinear, in the order of the model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base model, bit for bit (the low-rank branch is not computed at all)."""
    before = [(m, m.on) for m in lora_modules(model).values()]
    for m, _ in before:
        m.on = False
    try:
        yield
    finally:
        for m, on in before:
            m.on = on


# --- the flat view -----------------------------------------------------------------------------------------------------


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter ("...q_proj.A", "...q_proj.B", ...), in flat order."""
    return {f"{n}.{leaf}": getattr(m, leaf) for n, m in lora_modules(model).items() for leaf in ("A", "B")}


def slices(params: Mapping[str, Tensor]) -> dict[str, slice]:
    """Name -> its slice of the flat vector."""
    table, start = {}, 0
    for name, p in params.items():
        table[name] = slice(start, start + p.numel())
        start += p.numel()
    return table


def flatten(tensors: list[Tensor]) -> Tensor:
    """Any list of tensors as one new float32 vector, in order."""
    return torch.cat([t.reshape(-1).float() for t in tensors])


def flatten_grads(params: dict[str, nn.Parameter]) -> Tensor:
    """The loss gradient [P] (a parameter without a gradient counts as zero). The ascent direction is minus this."""
    return flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in params.values()])


def flatten_params(params: dict[str, nn.Parameter]) -> Tensor:
    """theta [P], a copy."""
    return flatten([p.detach() for p in params.values()])


def unflatten(params: dict[str, nn.Parameter], flat: Tensor) -> dict[str, Tensor]:
    """Views into `flat` [P] with the shapes of the parameters. Raises ValueError on a wrong length."""
    table = slices(params)
    total = sum(p.numel() for p in params.values())
    if flat.shape != (total,):
        raise ValueError(f"flat vector has shape {tuple(flat.shape)}, the adapter has {total} parameters")
    return {n: flat[s].view_as(params[n]) for n, s in table.items()}


def write_grads(params: dict[str, nn.Parameter], flat: Tensor) -> None:
    """Writes the loss gradient [P] into every .grad (negate an ascent direction first)."""
    for name, piece in unflatten(params, flat).items():
        params[name].grad = piece.to(params[name].dtype).clone()


@torch.no_grad()
def write_params(params: dict[str, nn.Parameter], flat: Tensor) -> None:
    """Writes theta [P] into the parameters."""
    for name, piece in unflatten(params, flat).items():
        params[name].copy_(piece)


@contextlib.contextmanager
def per_example(model: nn.Module, owner: Tensor, J: Tensor) -> Iterator[None]:
    """Per-example gradients in one backward pass. Inside, the backward of a sum of n functions, the i-th of them computed from
    the batch's rows b with owner[b] = i alone, adds the i-th function's gradient to J[i], and nothing to A.grad or B.grad.

    owner: int64 [batch], values 0..n-1. J: float32 [n, P]. What a linear adds for a row is the outer product of what went in and
    what came back, summed over its tokens: B^T dy x^T for A, dy (A x)^T for B."""
    modules, start = lora_modules(model).values(), 0
    for m in modules:
        to_a, to_b = start + m.A.numel(), start + m.A.numel() + m.B.numel()
        m.rows = (owner, J[:, start:to_a].view(-1, *m.A.shape), J[:, to_a:to_b].view(-1, *m.B.shape))  # views, [n, *shape]
        start = to_b
    try:
        yield
    finally:
        for m in modules:
            m.rows = None


class _PerExample(torch.autograd.Function):
    """scale * B A x, whose backward leaves the gradients of A and B row by row, see `per_example`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scale: float, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        h = scale * F.linear(x, A.to(x.dtype))  # [batch, T, r]
        ctx.save_for_backward(x, h, A, B)
        ctx.scale, ctx.rows = scale, rows
        return F.linear(h, B.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B = ctx.saved_tensors  # x [batch, T, in], h [batch, T, r], dy [batch, T, out]
        owner, for_a, for_b = ctx.rows
        A, B = A.to(x.dtype), B.to(x.dtype)
        dh = ctx.scale * (dy @ B)  # [batch, T, r]
        for_a.index_put_((owner,), torch.bmm(dh.mT, x).to(for_a.dtype), accumulate=True)
        for_b.index_put_((owner,), torch.bmm(dy.mT, h).to(for_b.dtype), accumulate=True)
        return dh @ A, None, None, None, None


# --- for the rollout engine, and on disk ----------------------------------------------------------------------------------


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(HF name, merged weight [out, in]) of every adapted linear, one at a time: no second copy of the model is held.

    Whole fused groups (q, k, v; gate, up; ...) come together, because all their members are adapted."""
    for name, m in lora_modules(model).items():
        yield f"{name}.weight", m.merged()


def save_adapter(model: nn.Module, folder: str | Path, base_name: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors in PEFT's format."""
    folder, modules = Path(folder), lora_modules(model)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(modules.values()))
    r = first.A.shape[0]
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=r,
        lora_alpha=first.scale * r,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        target_modules=sorted({n.rpartition(".")[2] for n in modules}),
    )
    tensors = {}
    for name, m in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = m.A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = m.B.detach().cpu().contiguous()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Reads a PEFT-format adapter into an injected model. Raises UserError when it is missing, torn or of another shape."""
    path = Path(folder) / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read the adapter {path}: {e}") from None
    for name, m in lora_modules(model).items():
        for leaf in ("A", "B"):
            key, p = f"base_model.model.{name}.lora_{leaf}.weight", getattr(m, leaf)
            if key not in tensors or tensors[key].shape != p.shape:
                raise UserError(f"{path} does not fit this model: {key} is missing or has another shape than {tuple(p.shape)}")
            p.copy_(tensors[key])
