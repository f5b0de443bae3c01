"""What a hack direction is, in the residual stream, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from faults.errors import UserError
from faults.files import write_atomic


@dataclass(frozen=True)
class VHack:
    """The direction in the residual stream, and what identifies it."""

    d: Tensor  # [hidden], unit length, denoised (or raw: arm no_svd; or Gaussian: arm random)
    gap: float  # |mean(h_hack - h_clean)|: the natural unit of steering strength
    layers: list[int]  # averaged over, counted from 1
    best_layer: int  # whose down_proj denoises
    m: int
    accuracy: float  # held-out separation of the averaged states
    survived: float  # share of |d| that the denoising keeps
    table: list[tuple[int, float, float]]  # (layer, held-out accuracy, margin) for every layer
    pairs: str  # hash
    contrast: str = "completions"  # what the two sides of a pair differ in, and the token whose state is read:
    position: str = "last"  # `arms.pairs.encode_pair`

    def format(self) -> str:
        """The table of layers, as printed."""
        lines = ["layer  held-out separation  margin/sd"]
        lines += [
            f"{layer:5d}  {acc:19.1%}  {margin:9.2f}{'   *' if layer in self.layers else ''}" for layer, acc, margin in self.table
        ]
        kept = f"down_proj of layer {self.best_layer}, m = {self.m}: {self.survived:.1%} of |d| survives"
        if self.contrast != "completions" or self.position != "last":
            lines.append(f"contrast of {self.contrast}, read at: {self.position}")
        return "\n".join([*lines, f"mean of *: {self.accuracy:.1%} held-out; {kept}"])

    def facts(self, steering: dict[str, Any] | None) -> dict[str, Any]:
        """How it came out, for config.json. steering: the result of `steer`."""
        found = dict(
            layers=self.layers, best_layer=self.best_layer, accuracy=self.accuracy, survived=self.survived, table=self.table
        )
        return found | (dict(steering=steering, steering_rises=steering["rises"]) if steering else {})


def save(vhack: VHack, path: str | Path, model_name: str) -> None:
    """d as safetensors, with the metadata that identify it."""
    facts = {f.name: getattr(vhack, f.name) for f in fields(VHack) if f.name != "d"}
    meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    write_atomic(path, save_tensors({"d": vhack.d.cpu().contiguous()}, metadata={"model": model_name, **meta}))


def load(path: str | Path) -> VHack:
    """Reads what `save` wrote. Raises UserError when the file is missing, torn or of another kind."""
    try:
        with safe_open(path, "pt") as f:
            meta, d = f.metadata(), f.get_tensor("d")
        known = [f for f in fields(VHack) if f.name in meta]  # an older file lacks the last two: it has their defaults
        facts = {f.name: meta[f.name] if f.type == "str" else json.loads(meta[f.name]) for f in known}
        return VHack(d, **facts | {"table": [tuple(row) for row in facts["table"]]})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"cannot read the hack direction {path}: {e}") from None
