"""What can be exported is, faithfully; what cannot is refused with a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedhlm.decoding.chat import chat_of
from fedhlm.decoding.decoder import Decoder, load_info
from fedhlm.decoding.hub import open_tokenizer
from fedhlm.decoding.models import tokenizer_at
from fedhlm.decoding.vocabulary import vocabulary_of
from fedhlm.errors import ConfigError, ModelError
from fedhlm_zoo import tiny
from fedhlm_zoo.info import summary
from tests.fedhlm.decoding.ggufs import tiny_gguf, write_gguf

pytest.importorskip("torch", reason="makes its models with torch")
pytest.importorskip("optimum.exporters.onnx", reason="exports its models with optimum")

from fedhlm_zoo import export as export_module
from fedhlm_zoo import gguf_weights
from fedhlm_zoo.export import compare_with_torch, export, load_torch
from fedhlm_zoo.quantise import quantise

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

Exported = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("kind", sorted(tiny.ARCHITECTURES))
def test_the_description_matches_the_source(exported: Exported, kind: str) -> None:
    source, folder = exported(kind)
    info = load_info(folder)
    model = load_torch(source)
    assert info.architecture == type(model).__name__
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.vocab_size == tiny.ARCHITECTURES[kind]().vocab_size
    assert (info.context, info.layers, info.hidden_size) == (tiny.CONTEXT, 2, 32)
    assert (info.kv_heads, info.head_dim) == (2 if kind == "qwen2" else 4, 8)
    assert (info.bos_id, info.eos_ids, info.quantisation) == (0, (0,), "fp32")
    assert sorted(info.files) == ["model.onnx", "tokenizer.json"]


def test_the_summary_tells_what_a_person_asks(exported: Exported) -> None:
    lines = summary(exported("qwen2")[1])
    assert lines["architecture"] == "Qwen2ForCausalLM"
    assert lines["context"] == "96 tokens"
    assert lines["cache"] == "256 bytes per token"


def test_a_tied_embedding_is_stored_once(exported: Exported) -> None:
    sizes = {kind: (exported(kind)[1] / "model.onnx").stat().st_size for kind in ("llama", "qwen2")}
    table = tiny.VOCAB_SIZE * 32 * 4
    # The untied model has the same shape but fewer key/value heads, and its own head.
    assert sizes["llama"] < sizes["qwen2"] - table * 0.5


def test_a_graph_of_other_weights_does_not_pass_for_the_model(exported: Exported, tmp_path: Path) -> None:
    other = load_torch(tiny.make_tiny("llama", tmp_path / "other", seed=9))
    assert compare_with_torch(other, Decoder.load(exported("llama")[1])) > export_module.TOLERANCE


def test_an_unfaithful_export_is_an_error(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)
    with pytest.raises(ModelError, match="from torch must be at most"):
        export(exported("llama")[0], tmp_path / "out")
    with pytest.raises(ModelError, match=r"model\.json"):
        load_info(tmp_path / "out")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere', which does not exist"):
        export(tmp_path / "nowhere", tmp_path / "out")


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"without .*config\.json"):
        export(tmp_path / "empty", tmp_path / "out")


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="must be a causal language model .*BertForSequenceClassification"):
        export(tmp_path / "bert", tmp_path / "out")


def test_a_configuration_that_is_not_json_is_refused(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no usable configuration"):
        export(tmp_path / "broken", tmp_path / "out")


def test_weights_that_are_missing_are_reported(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "weightless").mkdir()
    content = json.loads((exported("llama")[0] / "config.json").read_text())
    (tmp_path / "weightless" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        export(tmp_path / "weightless", tmp_path / "out")


def test_a_source_without_a_tokenizer_needs_one_given(exported: Exported, tmp_path: Path) -> None:
    source, _ = exported("llama")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    with pytest.raises(ModelError, match=r"no tokenizer\.json: give the tokenizer"):
        export(bare, tmp_path / "out")
    with pytest.raises(ModelError, match="holds none"):
        export(bare, tmp_path / "out", tokenizer=tmp_path)
    info = export(bare, tmp_path / "out", tokenizer=source, name="given")
    assert info.name == "given"


def test_an_unknown_tiny_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gpt2, qwen2"):
        tiny.make_tiny("mamba", tmp_path)


def test_a_chat_template_and_the_end_of_an_answer_come_along(tmp_path: Path) -> None:
    source = tiny.make_tiny("llama", tmp_path / "source", seed=3)
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}', "utf-8")
    (source / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 0]}', "utf-8")
    info = export(source, tmp_path / "onnx")
    assert info.eos_ids == (0, 7)
    quantise(tmp_path / "onnx", tmp_path / "small", mode="int8-dynamic")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "small" / name).read_bytes() == (source / name).read_bytes()


def test_a_model_whose_tokenizer_adds_nothing_begins_with_the_text(tmp_path: Path) -> None:
    source = tiny.make_tiny("llama", tmp_path / "source", seed=3)
    (source / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}', "utf-8")
    assert export(source, tmp_path / "onnx").bos_id is None
    small = quantise(tmp_path / "onnx", tmp_path / "small", mode="int8-dynamic").info
    assert (small.bos_id, load_info(tmp_path / "small").bos_id) == (None, None)


@pytest.mark.parametrize("begins", [False, True])
def test_a_gguf_file_is_exported_with_its_tokenizer_template_and_beginning(begins: bool, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reads GGUF files into torch")
    source = tiny_gguf(tmp_path / "tiny.gguf", tokenizer__ggml__add_bos_token=begins)
    info = export(source, tmp_path / "onnx")
    assert (info.name, info.eos_ids, info.bos_id) == ("tiny", (0,), 0 if begins else None)
    texts = ["Oil prices rise", "Öl 油 🛢"]
    tokenizer, vocabulary = tokenizer_at(source)
    assert [open_tokenizer(tmp_path / "onnx").encode(t).ids for t in texts] == [
        tokenizer.encode(t, add_special_tokens=False).ids for t in texts
    ]
    assert vocabulary_of(tmp_path / "onnx").digest == vocabulary.digest
    assert chat_of(tmp_path / "onnx") == chat_of(source)
    assert compare_with_torch(load_torch(source), Decoder.load(tmp_path / "onnx")) < 1e-4


@pytest.mark.parametrize(
    ("metadata", "begins"),
    [
        ({"model": "gpt2", "add_bos_token": True}, True),
        ({"model": "gpt2", "pre": "llama-bpe", "add_bos_token": False}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "llama"}, True),
        ({"model": "gpt2"}, False),
    ],
)
def test_a_gguf_file_that_does_not_say_how_texts_begin_follows_its_kind(
    metadata: dict[str, str | bool], begins: bool, tmp_path: Path
) -> None:
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    file = write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama", **named}, {})
    assert gguf_weights.begins(file) == begins
