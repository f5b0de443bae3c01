"""Rollouts through vLLM, in the trainer's own process, behind the interface of `engine.sampler.Sampler`.

    trainer                                   vLLM (0.32)
    merged weights, one module at a time -->  reload_weights -> prefix cache reset -> columns compared
    prompts (token ids)                  -->  generate       -> ids, logprobs at the sampling temperature

An engine that answers from other weights than the trainer believes gives plausible text and wrong gradients. So every
push is checked: its names and shapes against the checkpoint's, its values for NaN, its fused groups for wholeness (vLLM
stores q, k, v as one matrix), and afterwards some columns of every pushed matrix are read back out of the engine and
compared bit for bit. A push that fails leaves the engine unusable until a good one. docs/vllm.md has the reasons.

vLLM is imported when an engine starts, never before: the rest of the project works without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.sampler import Ended, Rollout, Stop, Weights, unheard
from engine.vllm_patches import columns_of, end_reload, import_vllm, random_state_kept, reader, vocab_limit
from faults.errors import PartDied, Stopped, UserError, one_line

# vLLM keeps each of these groups in one matrix, in this order, under the name on the left.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
FUSED_NAME = {member: name for name, members in FUSED.items() for member in members}


class EngineError(PartDied):
    """The engine cannot be trusted or has died. Nothing was sampled, so nothing can be trained on."""


class VLLMSampler:
    """One vLLM engine for one model on one device. Use as a context manager, or call `close`."""

    def __init__(
        self,
        model: str | Path,
        *,
        eos: Iterable[int],
        vocab: int,
        max_model_len: int,
        dtype: str | None = None,
        max_seqs: int = 128,
        gpu_memory: float = 0.35,
        cpu_cache_gib: int = 1,
        stop: Stop | None = None,
        log: str | Path = "vllm.log",
    ):
        """model: a checkpoint folder in Hugging Face's format (config.json, safetensors), or a hub id that is already on
        disk. eos: every id that ends a response. vocab: ids from there on are padding rows of the embedding and can't be
        sampled. max_model_len: prompt and completion together, in tokens. dtype: float32 or bfloat16; the
        checkpoint's by default. gpu_memory: the share of the card that vLLM takes, its weights and cache included. log:
        where vLLM's own log goes. stop: what ends a completion beside its end token; vLLM, which holds no tokenizer here,
        goes on, and the rest is cut off.

        Raises UserError when vLLM is not installed, the checkpoint can't be read or vLLM does not start.
        """
        self.folder, self.eos, self.vocab, self.max_model_len = local_folder(model), sorted(set(eos)), vocab, max_model_len
        self.log, self.names, self.stop = Path(log), checkpoint_shapes(self.folder), stop
        self.options = dict(dtype=dtype or "auto", max_num_seqs=max_seqs)
        self.gpu_memory, self.cpu_cache_gib = gpu_memory, cpu_cache_gib
        self.required: set[str] = set()  # every name ever pushed: each push must hold them all
        self.columns: dict[str, Tensor] = {}  # fused module -> the columns that it must have, [out, COLUMNS]
        self.version: int | None = None  # of the weights in the engine, as the caller numbers them
        self.usable, self.asleep, self.restarted = True, False, False
        self.source: Callable[[], Weights] | None = None
        self.llm: Any = None
        self._start()

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Weights | Callable[[], Weights], version: int | None = None) -> None:
        """Streams (HF name, tensor) pairs into the engine and checks that they arrived.

        Every push holds whole fused groups, and every name that an earlier push held. Given as a function, it is called
        again to fill an engine that died and was restarted, once. version: a number that `generate` can be asked to agree with.
        Raises EngineError, and leaves the engine unusable until a good push, when a tensor does not fit, when a group is
        half there, when vLLM fails, or when the engine does not hold what was pushed; Stopped when a tensor is not finite.
        """
        self.wake()
        self.source = weights if callable(weights) else None
        self.usable, self.columns = False, {}
        try:
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=self._checked(weights)))
            if not self.llm.reset_prefix_cache():
                raise EngineError("vLLM did not reset its prefix cache, which holds keys and values of the old weights")
            self.verify()
        except Exception as error:
            with contextlib.suppress(Exception):
                self.llm.collective_rpc(end_reload)
            self.columns = {}
            if isinstance(error, Stopped):
                raise
            if self.source is None or not self._may_restart():
                raise EngineError(f"pushing weights to vLLM failed: {one_line(error)} (log: {self.log})") from error
            self._restart(error)
        self.usable, self.version = True, version

    def _checked(self, weights: Weights | Callable[[], Weights]) -> Iterator[tuple[str, Tensor]]:
        """The stream that vLLM reads: names and shapes are the checkpoint's, every value is finite, no name is missing.

        The last check runs before vLLM finishes the reload, when its iterator runs out."""
        parts: dict[str, dict[str, Tensor]] = {}
        pushed = set()
        for name, tensor in weights() if callable(weights) else weights:
            own, shape = self.names.get(_text_name(name), (None, None))
            if own is None or shape != tuple(tensor.shape):
                raise EngineError(f"the checkpoint in {self.folder} has no weight {name} of shape {tuple(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise Stopped(
                    f"{name} holds values that are not finite: the weights were not pushed; start again with a lower --lr"
                )
            pushed.add(name)
            if tensor.dim() == 2 and ".layers." in name:
                module, member = _fused_module(name)
                parts.setdefault(module, {})[member] = tensor[:, columns_of(tensor.shape[1])].clone()
            yield own, tensor
        self._require_whole(pushed, parts)
        self.required |= pushed
        order = {module: FUSED.get(module.rpartition(".")[2], tuple(members)) for module, members in parts.items()}
        self.columns = {module: torch.cat([parts[module][m] for m in order[module]]) for module in parts}

    def _require_whole(self, pushed: set[str], parts: dict[str, dict[str, Tensor]]) -> None:
        for module, members in parts.items():
            if missing := set(FUSED.get(module.rpartition(".")[2], members)) - set(members):
                raise EngineError(f"half a fused group was pushed: {module} came without {', '.join(sorted(missing))}")
        if missing := self.required - pushed:
            raise EngineError(f"{len(missing)} weights of earlier pushes are missing from this one, {min(missing)} first")
        if not pushed:
            raise EngineError("an empty push: no weights came")

    def verify(self) -> None:
        """Reads some columns of every pushed matrix back out of the engine. Raises EngineError when one differs.

        The column j of a linear is its output for the unit vector e_j, exact in any float type: 1 * w + 0 + 0. So it
        works on packed weights too, which vLLM keeps on CPUs in place of the matrix."""
        for module, found in self.llm.apply_model(reader(self.columns))[0].items():
            if found is None or not torch.equal(found, self.columns[module].to(found)):
                self.usable = False
                raise EngineError(f"the vLLM engine is stale: {module} does not hold the weights that were pushed last")

    # --- sampling -----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], *, n: int, temperature: float, max_new_tokens: int, seed: int,
        version: int | None = None, ended: Ended = unheard,
    ) -> list[Rollout]:  # fmt: skip
        """n completions a prompt, prompt-major. Temperature 0 is greedy (its logprobs are those at temperature 1).

        Each completion is a request with a seed of its own, derived from `seed` and its place: vLLM's own n > 1 numbers
        its samples seed, seed + 1, ..., which makes neighbouring prompts share draws. version: refuse to sample from
        other weights than these. ended: called with each as it ends. An engine that dies is restarted once, if its weights
        came as a function, and samples all anew.
        Raises EngineError on an engine that is unusable or stale, or that died for good; UserError on a request
        that it can't take.
        """
        self.wake()
        self._require_usable(version)
        if not 0 <= temperature <= 2:
            raise UserError(f"vLLM samples at temperatures from 0 to 2, not at {temperature}")
        if (longest := max(map(len, prompts), default=0) + max_new_tokens) > self.max_model_len:
            raise UserError(
                f"a prompt and its completion may need {longest} tokens: raise max_model_len from {self.max_model_len}"
            )
        requests = [prompt for prompt in prompts for _ in range(n)]
        params = [self._params(temperature, max_new_tokens, _request_seed(seed, i)) for i in range(len(requests))]
        rollouts: dict[int, Rollout] = {}
        for i, output in self._outputs(requests, params):
            rollouts[i] = self._rollout(requests[i], output)
            ended(i, rollouts[i])
        return [rollouts[i] for i in range(len(requests))]

    def _require_usable(self, version: int | None) -> None:
        if not self.usable:
            raise EngineError("the last push of weights to vLLM failed: the engine is unusable until a full push succeeds")
        if version is not None and version != self.version:
            raise EngineError(f"the vLLM engine is stale: it holds weights {self.version}, the trainer is at {version}")

    def _params(self, temperature: float, max_new_tokens: int, seed: int):
        from vllm import SamplingParams

        return SamplingParams(
            temperature=temperature, max_tokens=max_new_tokens, seed=seed, logprobs=0, top_p=1.0, top_k=0,
            stop_token_ids=self.eos, detokenize=False,
        )  # fmt: skip

    def _outputs(self, requests: list[list[int]], params: list) -> Iterator[tuple[int, Any]]:
        """(place, vLLM's output) of each as it ends; where the engine died and was restarted, of all once more."""
        try:
            yield from self._sampled(requests, params)
        except Exception as error:
            self.usable = False
            if not self._may_restart() or (self.required and self.source is None):
                raise EngineError(f"the vLLM engine died: {one_line(error)} (log: {self.log})") from error
            try:
                self._restart(error)
                yield from self._sampled(requests, params)
            except Exception as again:
                self.usable = False
                raise EngineError(f"the vLLM engine died twice: {one_line(again)} (log: {self.log})") from again

    def _sampled(self, requests: list[list[int]], params: list) -> Iterator[tuple[int, Any]]:
        """What `LLM.generate` does, but for its waiting until the last has ended."""
        with random_state_kept():
            names = self.llm.enqueue([dict(prompt_token_ids=p) for p in requests], params, use_tqdm=False)
            place = {name.partition("-")[0]: i for i, name in enumerate(names)}  # vLLM has added random characters
            try:
                while self.llm.llm_engine.has_unfinished_requests():
                    for output in self.llm.llm_engine.step():
                        if output.finished:
                            yield place[output.request_id], output
            finally:  # where it is left early the next batch is not to meet what is left of this one
                with contextlib.suppress(Exception):
                    self.llm.llm_engine.abort_request(names, internal=True)

    def _rollout(self, prompt: list[int], output) -> Rollout:
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        logprobs = [entry[i].logprob for i, entry in zip(ids, completion.logprobs, strict=True)]
        if completion.finish_reason not in ("stop", "length") or not ids or not all(map(math.isfinite, logprobs)):
            self.usable = False
            raise EngineError(f"vLLM returned a broken completion (it ended by {completion.finish_reason}; log: {self.log})")
        end = self.stop.length(ids) if self.stop else None
        return Rollout(list(prompt), ids[:end], logprobs[:end], end is not None or ids[-1] in self.eos)

    # --- life ---------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """CUDA: frees the card for training; weights wait in the machine's memory, the cache is dropped. Else nothing."""
        if torch.cuda.is_available() and not self.asleep:
            with self._or_died("did not go to sleep"):
                self.llm.sleep(level=1)  # level 2 would drop what LoRA never pushes: embeddings and norms
            self.asleep = True

    def wake(self) -> None:
        """Takes the card back, and checks that the weights that return are those that were pushed last.

        `load_weights` and `generate` call it: a loop only says when to sleep."""
        if self.asleep:
            with self._or_died("did not wake"):
                torch.cuda.empty_cache()  # what training freed and torch still holds
                self.llm.wake_up()
                self.asleep = False
                if self.usable:
                    self.verify()

    @contextlib.contextmanager
    def _or_died(self, what: str) -> Iterator[None]:
        """Around calls of the engine on a card: any error that comes out of them is an EngineError, in one line."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"the vLLM engine {what}: {one_line(error)} (log: {self.log})") from error

    def close(self) -> None:
        """Ends the engine and gives its memory back. A second call does nothing."""
        if self.llm is None:
            return
        from vllm.v1.engine import core

        if self.asleep:  # asleep, its allocator refuses to be freed
            with contextlib.suppress(Exception):  # after a sticky error nothing on the card works; the run has said why it ends
                torch.cuda.empty_cache()
                self.llm.wake_up()
        if self.foreign_group:  # torchrun's: vLLM's shutdown would destroy the trainer's process group
            core.cleanup_dist_env_and_memory = lambda *_, **__: None
        with contextlib.suppress(Exception):
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None

    def __enter__(self) -> VLLMSampler:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        # torchrun's, not one that vLLM itself opened for an engine in this process
        self.foreign_group = "WORLD_SIZE" in os.environ and torch.distributed.is_initialized()
        with random_state_kept():  # LLM() seeds the global generators
            vllm = import_vllm(self.log, self.cpu_cache_gib)
            where = self._cuda_options() if torch.cuda.is_available() else self._cpu_options()
            if self.foreign_group:
                where |= dict(distributed_executor_backend="external_launcher")
            try:
                self.llm = vllm.LLM(
                    str(self.folder),
                    max_model_len=self.max_model_len,
                    skip_tokenizer_init=True,
                    seed=0,
                    logprobs_mode="processed_logprobs",  # the default is the distribution at temperature 1
                    logits_processors=[vocab_limit(runner=2 if torch.cuda.is_available() else 1)],
                    additional_config=dict(vocab=self.vocab),
                    language_model_only=True,
                    generation_config="vllm",
                    **where,
                    **self.options,
                )
            except Exception as error:
                raise UserError(f"vLLM did not start: {one_line(error)} (log: {self.log})") from error

    def _cuda_options(self) -> dict:
        """The head in float32, as in the trainer: without it the two disagree by the rounding of bf16 logits. No prefix cache
        for hybrid models, whose every block would hold two states of the linear layers beside the keys."""
        return dict(
            gpu_memory_utilization=self.gpu_memory,
            enable_sleep_mode=True,
            hf_overrides=dict(head_dtype="float32"),
            enable_prefix_caching=not self._hybrid(),
        )

    def _cpu_options(self) -> dict:
        """A seeded request whose prompt is read in several pieces breaks on CPU (vLLM rewinds a CUDA generator there)."""
        limit = dict(enable_chunked_prefill=False, max_num_batched_tokens=max(self.max_model_len, 8192))
        return limit | dict(enforce_eager=True, enable_prefix_caching=not self._hybrid())

    def _hybrid(self) -> bool:
        """Linear-attention layers: with prefix caching vLLM cuts their prompts at block borders, see `_cpu_options`."""
        return any(".linear_attn." in name for name in self.names)

    def _may_restart(self) -> bool:
        """Once, and not on CUDA: there a dead engine keeps its memory, after some errors nothing on the card works any more,
        and under torchrun the other ranks would wait for this one. The run ends with a checkpoint instead."""
        return not self.restarted and not torch.cuda.is_available()

    def _restart(self, error: Exception) -> None:
        logging.getLogger(__name__).warning("restarting vLLM, once: it died of %s", one_line(error))
        self.restarted = True
        version, source = self.version, self.source
        self.close()
        try:
            self._start()
        except UserError as again:
            raise EngineError(f"the vLLM engine died, and {again}") from error
        if source is not None:
            self.load_weights(source, version)
        self.usable = True


def local_folder(model: str | Path) -> Path:
    """The folder of a model that is a folder already or lies in the Hugging Face cache; nothing is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except Exception:
        raise UserError(f"the model {model} is not on disk: download it first, or name a folder with --model") from None


def checkpoint_shapes(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the text-only class -> (name in the checkpoint, shape), from the headers of the safetensors files.

    Raises UserError when there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"vLLM needs a checkpoint folder with safetensors files: there are none in {folder}")
    table = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                table[_text_name(name)] = (name, tuple(file.get_slice(name).get_shape()))
    return table


def _text_name(name: str) -> str:
    """The multimodal class keeps the text model one level down; the text-only class has it at `model.`"""
    return name.replace("model.language_model.", "model.", 1)


def _fused_module(name: str) -> tuple[str, str]:
    """model.layers.0.self_attn.k_proj.weight -> (layers.0.self_attn.qkv_proj, k_proj)"""
    parent, _, member = name.removesuffix(".weight").rpartition(".")
    return "layers." + parent.partition("layers.")[2] + "." + FUSED_NAME.get(member, member), member


def _request_seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4]) >> 1
