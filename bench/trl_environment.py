"""A Python that has trl: this one, or a virtual environment of its own on top of this one, made when it is first asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import zlib

from faults.errors import UserError
from harness.config import ROOT

FOLDER = ROOT / ".venv-trl"  # git ignores it


def python_with_trl() -> str:
    """The path of the interpreter. Says in one line what it will do before it installs anything. Raises UserError, in one line.

    The environment lies on top of this one: torch, transformers and PEFT are the same files for both sides of the comparison, and
    only what the extra `trl` adds is new."""
    if importlib.util.find_spec("trl") is not None:
        return sys.executable
    python, stamp = FOLDER / "bin" / "python", FOLDER / f"made-{_fingerprint()}"
    if not stamp.exists():
        print(f"trl is not installed here: making {FOLDER} with the extra trl of pyproject.toml, 300 MB, a minute", flush=True)
        _said([sys.executable, "-m", "venv", "--clear", str(FOLDER)])
        (site,) = FOLDER.glob("lib/python*/site-packages")
        (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _said([str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[trl]"])
        stamp.touch()
    return str(python)


def _fingerprint() -> str:
    """Changes with the wanted versions, and with the environment below."""
    wanted = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes() + sys.prefix.encode()
    return f"{zlib.crc32(wanted):08x}"


def _said(command: list[str]) -> None:
    """Runs it. Raises UserError with the last line that it said."""
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        last = ([line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"])[-1]
        raise UserError(f"cannot install trl ({last[:200]}): where there is an index, pip install -e '.[trl]' brings it")
