"""GGUF models on llama.cpp: they conform, give llama.cpp's own numbers, and say what is wrong with a file."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.invariance import steadier
from fedhlm.decoding.llama import LlamaModel
from fedhlm.decoding.models import CONTEXT_MAX, LoadedModel, load_model
from fedhlm.errors import ModelError
from tests.fedhlm.decoding.conformance import TEXTS, Conformance, differs
from tests.fedhlm.decoding.ggufs import CONTEXT, WIDTH, metadata_of_shipped, tensors_of, tiny_gguf, write_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'fedhlm[llama]'")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module", params=[True, False], ids=["drafting", "verifying"])
def model(request: pytest.FixtureRequest, path: Path) -> LoadedModel:
    return load_model(path, drafting=request.param)


class TestLlama(Conformance):
    """A device's model, and a cloud's."""

    sessions = 1_000
    # F32 weights and a cache in bfloat16: 0.009 has been seen on a processor without AVX-512.
    close_of_many = 0.1

    def test_logits_and_hidden_states_are_llama_cpps(self, model: LoadedModel, path: Path) -> None:
        ids = self.ids(model, 30, seed=1)
        logits, hidden = oracle(path, ids)
        result = self.ask(model, model.empty_cache(), ids)
        rounding = self.close if result.hidden is not None else 0.1  # values of a model that verifies are bfloat16
        assert differs(result.logits, logits[:, : model.vocabulary.size]) <= rounding
        if result.hidden is None:
            return
        assert result.hidden.shape == (30, WIDTH)
        assert differs(result.hidden, hidden) <= self.close
        head = tensors_of(model.info.vocab_size)["token_embd.weight"]
        assert differs(result.hidden @ head.T, logits) <= 1e-2

    def test_a_long_text_makes_room_and_others_survive_it(self, model: LoadedModel) -> None:
        short, long = self.ids(model, 20, seed=2), self.ids(model, CONTEXT - 1, seed=3)
        held = self.ask(model, model.empty_cache(), short[:-1], 0).cache
        whole = self.ask(model, model.empty_cache(), long, 0).cache
        again = self.ask(model, held, short[-1:]).logits
        assert differs(again, self.scratch(model, short)[-1:]) <= self.close
        assert differs(self.ask(model, whole, [5]).logits, self.scratch(model, [*long, 5], 1)) <= self.close

    def test_texts_that_do_not_fit_together_are_computed_one_after_the_other(self, model: LoadedModel) -> None:
        texts = [self.ids(model, 400, seed=seed) for seed in range(12)]
        results = model.forward([DecoderInput(model.empty_cache(), text, 1) for text in texts])
        for text, result in zip(texts[::5], results[::5], strict=True):
            assert differs(result.logits, self.scratch(model, text, 1)) <= self.close


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_and_blocks_of_a_long_text_agree_on_any_number_of_threads(path: Path, threads: int) -> None:
    """From 64 tokens of a block, and from 512 keys with several threads, llama.cpp may add up in another order."""
    model = load_model(path, threads=threads)
    ids = np.random.default_rng(4).integers(0, model.vocabulary.size, 600).tolist()
    whole = model.forward([DecoderInput(model.empty_cache(), ids, 80)])[0].logits
    cache, rows = model.forward([DecoderInput(model.empty_cache(), ids[:-80], 0)])[0].cache, []
    for begin, end in ((520, 521), (521, 529), (529, 530), (530, 600)):
        result = model.forward([DecoderInput(cache, ids[begin:end])])[0]
        rows.append(result.logits)
        cache = result.cache
    assert differs(np.concatenate(rows), whole) <= 1e-3


def oracle(path: Path, ids: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and hidden states from llama.cpp alone, in one call."""
    loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.embeddings = 256, True
    context = llama_cpp.llama_init_from_model(loaded, parameters)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for number, token in enumerate(ids):
        batch.token[number], batch.pos[number], batch.n_seq_id[number] = token, number, 1
        batch.seq_id[number][0], batch.logits[number] = 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), rows)).copy()
    hidden = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings(context), (len(ids), WIDTH)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded)
    return logits, hidden


def test_texts_have_llama_cpps_ids(path: Path) -> None:
    model = load_model(path)
    assert isinstance(model, LlamaModel)
    vocabulary = llama_cpp.llama_model_get_vocab(model._weights.pointer)
    for text in (*TEXTS, "<|endoftext|>", "12 345\n\n x  ", "it's ἀρχή\tx"):
        raw, found = text.encode(), (ctypes.c_int32 * 200)()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), found, 200, False, False)
        assert model.tokenizer.encode(text, add_special_tokens=False).ids == list(found)[:count]


def test_a_file_says_what_its_model_is(path: Path, tmp_path: Path) -> None:
    info = load_model(path).info
    assert (info.name, info.architecture, info.context, info.hidden_size) == ("tiny", "llama", CONTEXT, WIDTH)
    assert (info.layers, info.kv_heads, info.head_dim, info.quantisation) == (2, 2, 16, "F32")
    assert (info.eos_ids, info.bos_id) == ((0,), None)
    assert load_model(path).token_bytes == 2 * 2 * 2 * 2 * 16
    other = tiny_gguf(tmp_path / "other.gguf", tokenizer__ggml__add_bos_token=True, llama__context_length=100_000)
    info = load_model(other).info
    assert (info.bos_id, info.context) == (0, CONTEXT_MAX)
    assert info.label != load_model(path).info.label
    assert "GGUF file in Q8_0" in steadier(info)
    assert load_model(other, context=600).info.context == 600


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"general__architecture": "unheard"}, r"cannot be loaded by llama.cpp: unknown model architecture: 'unheard'"),
        ({"llama__block_count": 3}, r"cannot be loaded by llama.cpp: .*blk\.2\."),
    ],
)
def test_models_that_cannot_be_run_are_told(tmp_path: Path, others: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(tiny_gguf(tmp_path / "model.gguf", **others))


def test_a_truncated_file_is_told(path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be loaded by llama.cpp: .*incomplete"):
        load_model(cut)


def test_padding_of_the_table_is_left_out(tmp_path: Path) -> None:
    metadata = metadata_of_shipped()
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    model = load_model(write_gguf(tmp_path / "padded.gguf", metadata, tensors_of(size + 2)))
    assert (model.vocabulary.size, model.info.vocab_size) == (size, size + 2)
    assert model.forward([DecoderInput(model.empty_cache(), [1])])[0].logits.shape == (1, size)


def test_no_file_is_left_open_at_the_end_of_a_process(path: Path) -> None:
    script = f"from fedhlm.decoding.models import load_model; load_model({str(path)!r})"
    command = [sys.executable, "-X", "dev", "-W", "always::ResourceWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "ResourceWarning" in done.stderr) == (0, False), done.stderr
