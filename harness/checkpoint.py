"""Nothing lost: the run folder, its checkpoints, and what happens on a signal.

A checkpoint is checkpoints/step-000050.safetensors (adapter, AdamW moments, lifts) and step-000050.json beside it, which
holds the SHA-256 of the first, that of itself, that of the run's settings, the step, and how long each log was. Both are
written under a temporary name, synced and renamed, the JSON last: a checkpoint without its JSON does not exist. The newest
two are kept. Nothing that is read back can execute: safetensors and JSON only.

Random numbers need no state. Sampling seeds, the order of problems and the learning rate are functions of (seed, step),
so the parameters, the moments and the step are the whole state, and a resumed run is the undisturbed one, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from faults.errors import Signalled, Stopped, UserError, ending_signals
from faults.files import LOCK, to_lines, write_atomic, write_json
from harness.config import Config, identity, portable

LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")
KEEP = 2


def refuse_existing(folder: Path, resuming: bool) -> None:
    """Raises UserError when a new run would overwrite something."""
    try:
        taken = not resuming and folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {LOCK})
    except OSError as e:
        raise UserError(f"cannot write the run folder {folder}: {e.strerror}") from None
    if taken:
        raise UserError(f"{folder} already exists: name another with --out, remove it, or go on with --resume {folder}")


class Signals:
    """SIGTERM, SIGHUP and Ctrl-C while it is entered: they end the run at once, but while `patient` they are only noted."""

    def __init__(self, how: Callable[[], str]):
        """how: the line that says how to go on."""
        self.how, self.patient, self.seen = how, False, 0

    def __enter__(self) -> Signals:
        self.before = {s: signal.signal(s, self._note) for s in ending_signals()}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        again, self.seen = self.seen, self.seen or number
        if not self.patient or (again and number == signal.SIGINT):
            raise Signalled(self.how(), number)


class RunState:
    """The files of one run, and the parameters and optimizer that they hold."""

    def __init__(self, folder: Path, params: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, writes: bool = True):
        """writes: whether this process writes (of several ranks, the first alone does); all of them resume."""
        self.folder, self.params, self.optimizer, self.writes = folder, params, optimizer, writes

    def create(self, config: dict) -> None:
        """A new run folder with config.json. Raises UserError when it cannot be written."""
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", config)  # the first: with it alone the run can be gone on with
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            for name in LOGS:
                (self.folder / name).touch()
        except OSError as e:
            raise UserError(f"cannot write the run folder {self.folder}: {e.strerror}") from None

    def log(self, line: dict, seconds: dict, samples: list[dict]) -> None:
        """Appends to the logs, a whole line at a time, so that they can be read while the run goes on."""
        if not self.writes:
            return
        timings = dict(step=line["step"], **{k: round(v, 4) for k, v in seconds.items()})
        with self.writing():
            for name, rows in zip(LOGS, ([line], [timings], samples), strict=True):
                if rows:
                    if not (self.folder / name).exists():
                        raise FileNotFoundError(2, f"{name} was removed")
                    with open(self.folder / name, "a") as f:
                        f.write(to_lines(rows))

    def dump_batch(self, step: int, record: dict) -> Path:
        """The batch of a step that was not applied, for inspection; returns its path."""
        path = self.folder / f"nonfinite-step-{step:06d}.json"
        if self.writes:
            with self.writing():
                write_json(path, record)
        return path

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around everything that is written into the run folder: a full disk and the like become Stopped, in one line."""
        try:
            yield
        except (OSError, SafetensorError) as e:
            raise Stopped(
                f"cannot write to the run folder {self.folder}: {getattr(e, 'strerror', e)}; the last checkpoint is untouched. "
                f"Mend it, then: python grpo.py --resume {self.folder}"
            ) from None

    def save(self, step: int, extra: dict[str, Tensor]) -> None:
        """A checkpoint after `step` steps. `extra`: the run's other tensors. Raises Stopped when it cannot be written."""
        if self.writes:
            self.write(step, self.snapshot(extra))

    def snapshot(self, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds, as copies in the machine's memory."""
        tensors = {f"extra.{k}": t for k, t in extra.items()}
        for name, p in self.params.items():
            tensors[f"param.{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                tensors[f"adam.{key}.{name}"] = value
        return {k: t.cpu().contiguous().clone() for k, t in tensors.items()}

    def write(self, step: int, tensors: dict[str, Tensor]) -> None:
        """A checkpoint after `step` steps of what `snapshot` gave. Raises Stopped when it cannot be written."""
        blob = save_tensors(tensors)
        stem = self.folder / "checkpoints" / f"step-{step:06d}"
        with self.writing():
            stem.parent.mkdir(exist_ok=True)
            meta = dict(step=step, sha256=_sha256(blob), run=self._run(), logs=self._log_sizes(sync=True))
            meta["self"] = _seal(meta)
            write_atomic(stem.with_suffix(".safetensors"), blob)
            write_json(stem.with_suffix(".json"), meta)
            written = sorted(stem.parent.glob("step-*.json"))
            kept = [path for path in written if path.stem <= stem.name][-KEEP:]  # a later one is torn: the run went on before it
            for old in {*written} - {*kept}:
                old.unlink()  # the JSON first: without it the checkpoint does not exist
                old.with_suffix(".safetensors").unlink(missing_ok=True)

    def resume(self) -> tuple[int, dict[str, Tensor]]:
        """(steps done, extra tensors) of the newest whole checkpoint, loaded; the logs are cut to where they were then.

        (0, {}) when there is none yet. A torn or foreign checkpoint is named and the one before it is used. Raises UserError
        where steps were done and none is left: a run has one before its first step, so that they are lost."""
        for path in sorted((self.folder / "checkpoints").glob("step-*.json"), reverse=True):
            try:
                meta, tensors = read_checkpoint(path)
                self._check(meta)
                self._load(tensors)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as e:
                print(f"checkpoint {path.stem} is torn or foreign ({e}); trying the one before it")
                continue
            self._cut_logs(meta["logs"])
            print(f"resuming after step {meta['step']}")
            return meta["step"], {k.removeprefix("extra."): t for k, t in tensors.items() if k.startswith("extra.")}
        later = any((self.folder / "checkpoints").glob("step-*[1-9]*.json"))
        if later or any((self.folder / n).exists() and (self.folder / n).stat().st_size for n in LOGS):
            raise UserError(
                f"{self.folder} has done steps, but none of its checkpoints is whole: put checkpoints/ and its logs back as they "
                "were, or begin again in another folder with --out"
            )
        self._cut_logs(dict.fromkeys(LOGS, 0))
        print("no whole checkpoint: starting from the first step")
        return 0, {}

    def change(self, cfg: Config) -> None:
        """config.json with the settings that a resumed run goes on with; what decides its result is the same as before."""
        path = self.folder / "config.json"
        content = json.loads(path.read_text())
        if self.writes and content["config"] != (settings := portable(cfg)):
            with self.writing():
                write_json(path, content | {"config": settings})

    def _run(self) -> str:
        return identity(json.loads((self.folder / "config.json").read_text()))

    def _log_sizes(self, sync: bool = False) -> dict[str, int]:
        """The logs' lengths; with `sync`, once so much of them is on the disk."""
        sizes = {}
        for name in LOGS:
            with open(self.folder / name, "rb") as f:
                if sync:
                    os.fsync(f.fileno())
                sizes[name] = os.fstat(f.fileno()).st_size
        return sizes

    def _check(self, meta: dict) -> None:
        """Raises ValueError for another run's checkpoint, or one whose steps are no longer in the logs."""
        if meta["run"] != self._run():
            raise ValueError("it belongs to a run with another config.json")
        for name, size in self._log_sizes().items():
            if size < meta["logs"][name]:
                raise ValueError(f"{name} is shorter than it was when the checkpoint was written")

    def _cut_logs(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items() if self.writes else ():
            with self.writing(), open(self.folder / name, "a+b") as f:
                f.truncate(size)

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.params.items():
            if tensors[f"param.{name}"].shape != p.shape:
                raise ValueError(f"{name} has another shape")
        for name, p in self.params.items():
            p.copy_(tensors[f"param.{name}"])
            if f"adam.step.{name}" in tensors:  # before the first step AdamW has no moments
                state = {k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {k: t if k == "step" else t.to(p.device) for k, t in state.items()}

    def finish(self, phases: dict[str, float], seconds: float) -> None:
        """Marks the run as done: the last file that is written. What earlier legs of a resumed run took is in timings.jsonl."""
        lines = [json.loads(line) for line in (self.folder / "timings.jsonl").read_text().splitlines()]
        looped = {k: sum(line[k] for line in lines) for k in lines[0] if k != "step"}
        seconds += sum(max(0.0, v - phases.get(k, 0.0)) for k, v in looped.items())
        with self.writing():
            write_json(
                self.folder / "done.json",
                dict(steps=len(lines), seconds=round(seconds, 1), phases={k: round(v, 1) for k, v in (phases | looped).items()}),
            )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(meta: dict) -> str:
    return _sha256(json.dumps(meta, sort_keys=True).encode())


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors) of a checkpoint's JSON file. Raises ValueError, KeyError or OSError unless every hash fits."""
    meta = json.loads(path.read_bytes())
    seal = meta.pop("self")
    if seal != _seal(meta):
        raise ValueError("its JSON does not fit its hash")
    blob = path.with_suffix(".safetensors").read_bytes()
    if _sha256(blob) != meta["sha256"]:
        raise ValueError("its tensors do not fit their hash")
    return meta, load_tensors(blob)
