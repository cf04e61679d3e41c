"""The decoder against torch, and against itself: however tokens are cut into calls, the logits are the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedhlm.decoding.decoder import Cache, Decoder, DecoderInput, load_info
from fedhlm.decoding.vocabulary import vocabulary_of
from fedhlm.errors import ModelError

torch = pytest.importorskip("torch", reason="makes its models with torch")
pytest.importorskip("optimum.exporters.onnx", reason="exports its models with optimum")

from fedhlm_zoo import tiny  # noqa: E402
from fedhlm_zoo.export import export, load_torch  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

CLOSE = 1e-4


class Case:
    """One architecture: its torch model, its exported folder and a decoder."""

    def __init__(self, kind: str, root: Path) -> None:
        source = tiny.make_tiny(kind, root / "source", seed=1)
        self.folder = root / "onnx"
        export(source, self.folder)
        self._torch = load_torch(source)
        self.decoder = Decoder.load(self.folder)

    def torch_logits(self, ids: list[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(self._torch(torch.tensor([ids])).logits[0, :, : tiny.VOCAB_SIZE])  # (len(ids), V)

    def torch_hidden(self, ids: list[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            output = self._torch(torch.tensor([ids]), output_hidden_states=True)
        return np.asarray(output.hidden_states[-1][0])  # (len(ids), hidden_size), after the final norm

    def prefill(self, ids: list[int]) -> Cache:
        cache: Cache = self.decoder.forward([DecoderInput(self.decoder.empty_cache(), ids)])[0].cache
        return cache


@pytest.fixture(scope="module", params=sorted(tiny.ARCHITECTURES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"))


def random_ids(count: int, *, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, tiny.VOCAB_SIZE, count)]


def differs(a: NDArray[Any], b: NDArray[Any]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def test_prefill_gives_torchs_logits_and_last_hidden_state(case: Case) -> None:
    ids = random_ids(30, seed=1)
    result = case.decoder.forward([DecoderInput(case.decoder.empty_cache(), ids)])[0]
    assert differs(result.logits, case.torch_logits(ids)) < CLOSE
    assert result.hidden is not None
    assert differs(result.hidden, case.torch_hidden(ids)) < CLOSE
    assert result.cache.length == 30
    assert {a.shape for a in result.cache.arrays} == {(1, case.decoder.info.kv_heads, 30, case.decoder.info.head_dim)}


def test_tokens_cut_into_steps_and_blocks_give_torchs_logits(case: Case) -> None:
    ids = random_ids(40, seed=2)
    expected = case.torch_logits(ids)
    cache = case.decoder.empty_cache()
    begin = 0
    for size in (1, 7, 1, 1, 8, 3, 19):
        result = case.decoder.forward([DecoderInput(cache, ids[begin : begin + size])])[0]
        assert differs(result.logits, expected[begin : begin + size]) < CLOSE
        cache, begin = result.cache, begin + size
    assert begin == len(ids)


def test_a_batch_with_unequal_pasts_and_blocks_gives_each_row_its_own_logits(case: Case) -> None:
    texts = [random_ids(n, seed=n) for n in (9, 33, 1, 20)]
    pasts = (4, 31, 0, 1)
    requests = [
        DecoderInput(case.prefill(ids[:past]) if past else case.decoder.empty_cache(), ids[past:])
        for ids, past in zip(texts, pasts, strict=True)
    ]
    results = case.decoder.forward(requests)
    for ids, past, result in zip(texts, pasts, results, strict=True):
        assert differs(result.logits, case.torch_logits(ids)[past:]) < CLOSE
        assert result.hidden is not None
        assert differs(result.hidden, case.torch_hidden(ids)[past:]) < CLOSE
    following = case.decoder.forward([DecoderInput(r.cache, [5]) for r in results])
    for ids, result in zip(texts, following, strict=True):
        assert result.cache.length == len(ids) + 1
        assert differs(result.logits, case.torch_logits([*ids, 5])[-1:]) < CLOSE


@pytest.mark.parametrize("rows", [(0, 0, 0), (0, 3, 1), (2, 0, 7)])
@pytest.mark.parametrize("batched", [False, True])
def test_only_the_rows_that_are_wanted_are_given(case: Case, rows: tuple[int, ...], batched: bool) -> None:
    """The cache is the same with or without them."""
    texts = [random_ids(n, seed=n) for n in (9, 4, 12)]
    decoder, empty = case.decoder, case.decoder.empty_cache()
    whole = [decoder.forward([DecoderInput(empty, ids)])[0] for ids in texts]
    requests = [DecoderInput(empty, ids, wanted) for ids, wanted in zip(texts, rows, strict=True)]
    given = decoder.forward(requests) if batched else [decoder.forward([request])[0] for request in requests]
    for full, part, wanted in zip(whole, given, rows, strict=True):
        assert part.logits.shape == (wanted, full.logits.shape[1])
        assert part.hidden is not None
        assert full.hidden is not None
        assert part.hidden.shape == (wanted, full.hidden.shape[1])
        if wanted:
            assert differs(part.logits, full.logits[-wanted:]) < CLOSE
            assert differs(part.hidden, full.hidden[-wanted:]) < CLOSE
        assert part.cache.length == full.cache.length
        for ours, theirs in zip(part.cache.arrays, full.cache.arrays, strict=True):
            assert differs(ours, theirs) < CLOSE


@pytest.mark.parametrize("batched", [False, True])
def test_truncate_then_continue_equals_from_scratch(case: Case, batched: bool) -> None:
    ids = random_ids(24, seed=3)
    other = random_ids(10, seed=4)
    grown = case.decoder.forward([DecoderInput(case.prefill(ids), other)])[0].cache
    for kept in (24, 23, 5, 1, 0):
        requests = [DecoderInput(grown.truncated(kept), other[:6])]
        if batched:
            requests.append(DecoderInput(case.prefill(ids[:13]), [1, 2]))
        result = case.decoder.forward(requests)[0]
        scratch = case.decoder.forward([DecoderInput(case.decoder.empty_cache(), ids[:kept] + other[:6])])[0]
        assert differs(result.logits, scratch.logits[kept:]) < CLOSE
        for ours, theirs in zip(result.cache.arrays, scratch.cache.arrays, strict=True):
            assert differs(ours, theirs) < CLOSE


def test_a_cache_is_a_value_that_no_call_changes(llama: Case) -> None:
    cache = llama.prefill(random_ids(12, seed=5))
    before = [a.copy() for a in cache.arrays]
    cut = cache.truncated(6)
    llama.decoder.forward([DecoderInput(cache, [1, 2])])
    llama.decoder.forward([DecoderInput(cache, [3]), DecoderInput(cut, [4, 5])])
    cut.arrays[0][:] = 7.0
    assert all(np.array_equal(a, b) for a, b in zip(cache.arrays, before, strict=True))


def test_a_cache_holds_its_own_tokens_and_nothing_else(case: Case) -> None:
    """Neither the batch in which it was computed, nor the longer cache from which it was cut."""

    def held(array: NDArray[Any]) -> int:
        while isinstance(array.base, np.ndarray):
            array = array.base
        return array.nbytes

    start = case.prefill(random_ids(9, seed=7))
    caches = [done.cache for done in case.decoder.forward([DecoderInput(start, [1, 2, 3]) for _ in range(4)])]
    for cache in (*caches, caches[0].truncated(5), start):
        assert sum(held(a) for a in cache.arrays) == cache.length * case.decoder.token_bytes


@pytest.mark.parametrize("length", [-1, 13])
def test_a_cache_cannot_be_cut_to_a_length_it_does_not_have(llama: Case, length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens: it holds 12"):
        llama.prefill(random_ids(12, seed=6)).truncated(length)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([], "at least one"),
        ([tiny.VOCAB_SIZE], "0..256"),
        ([-1], "0..256"),
        ([1] * (tiny.CONTEXT + 1), f"at most {tiny.CONTEXT} tokens"),
    ],
)
def test_a_request_that_cannot_run_is_refused(llama: Case, ids: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        llama.decoder.forward([DecoderInput(llama.decoder.empty_cache(), ids)])


def test_the_full_context_can_be_used(case: Case) -> None:
    ids = random_ids(tiny.CONTEXT, seed=7)
    result = case.decoder.forward([DecoderInput(case.prefill(ids[:-1]), ids[-1:])])[0]
    assert differs(result.logits, case.torch_logits(ids)[-1:]) < CLOSE


def test_the_vocabulary_is_that_of_the_tokenizer_however_the_model_pads_its_table(case: Case, llama: Case) -> None:
    assert case.decoder.vocabulary == llama.decoder.vocabulary == vocabulary_of(llama.folder)
    assert case.decoder.vocabulary.size == tiny.VOCAB_SIZE


def test_some_family_pads_its_table() -> None:
    assert {make().vocab_size for make in tiny.ARCHITECTURES.values()} == {tiny.VOCAB_SIZE, tiny.PADDED_ROWS}


def test_without_rows_there_are_no_logits_of_the_vocabularys_width(case: Case) -> None:
    result = case.decoder.forward([DecoderInput(case.decoder.empty_cache(), [3, 4], 0)])[0]
    assert result.logits.shape == (0, tiny.VOCAB_SIZE)


class Watched:
    """A session of onnxruntime that notes each run: how many ids it was fed, and whether it computed logits."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.runs: list[tuple[int, bool]] = []

    def run(self, names: list[str], feeds: dict[str, Any], *options: Any) -> Any:
        self.runs.append((feeds["input_ids"].shape[1], "logits" in names))
        return self._session.run(names, feeds, *options)


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        (1, [(12, False), (12, False), (12, True)]),
        (13, [(12, False), (12, True), (12, True)]),
        (0, [(12, False), (12, False), (12, False)]),
        (None, [(12, True), (12, True), (12, True)]),
    ],
)
def test_a_long_text_is_fed_in_pieces_and_only_the_last_ones_compute_logits(
    case: Case, monkeypatch: pytest.MonkeyPatch, rows: int | None, runs: list[tuple[int, bool]]
) -> None:
    """Each piece holds as many rows as it has ids, so that memory does not grow with the text."""
    ids = random_ids(36, seed=8)
    watched = Watched(case.decoder._session)
    monkeypatch.setattr(case.decoder, "_session", watched)
    monkeypatch.setattr(case.decoder, "_run_max", 12)
    result = case.decoder.forward([DecoderInput(case.decoder.empty_cache(), ids, rows)])[0]
    assert watched.runs == runs
    wanted = len(ids) if rows is None else rows
    assert differs(result.logits, case.torch_logits(ids)[len(ids) - wanted :]) < CLOSE if wanted else True
    assert result.logits.shape == (wanted, tiny.VOCAB_SIZE)
    assert result.hidden is not None
    assert len(result.hidden) == wanted
    following = case.decoder.forward([DecoderInput(result.cache, [5])])[0]
    assert differs(following.logits, case.torch_logits([*ids, 5])[-1:]) < CLOSE


def broken_copy(case: Case, target: Path) -> Path:
    target.mkdir()
    for file in case.folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rewrite_info(folder: Path, **changes: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "model.json"])
def test_a_missing_file_is_named(llama: Case, tmp_path: Path, name: str) -> None:
    folder = broken_copy(llama, tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name}.*(is missing|cannot be read)"):
        Decoder.load(folder)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_changed_or_cut_file_is_named(llama: Case, tmp_path: Path, name: str) -> None:
    folder = broken_copy(llama, tmp_path / "m")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ModelError, match=f"{name} has {len(content) - 1} bytes"):
        load_info(folder)
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=f"{name} has changed"):
        load_info(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "not a model description"), (b"\xff\xfe", "not a model description"), (b'{"name": 3}', "name")],
)
def test_a_malformed_description_is_refused(llama: Case, tmp_path: Path, content: bytes, complaint: str) -> None:
    folder = broken_copy(llama, tmp_path / "m")
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ModelError, match=complaint):
        Decoder.load(folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layers": 3}, r"without the inputs \['past_key_values.2.key'"),
        ({"layers": 1}, r"got \['past_key_values.1.key'"),
        ({"kv_heads": 2}, "key cache of shape"),
        ({"vocab_size": 100}, "must be below 100, the size of the model's vocabulary .got 256."),
        ({"files": {}}, "lists no model.onnx"),
    ],
)
def test_a_description_that_does_not_fit_the_graph_is_refused(
    llama: Case, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    folder = broken_copy(llama, tmp_path / "m")
    rewrite_info(folder, **changes)
    with pytest.raises(ModelError, match=complaint):
        Decoder.load(folder)


def test_a_description_may_not_name_files_outside_its_folder(llama: Case, tmp_path: Path) -> None:
    folder = broken_copy(llama, tmp_path / "m")
    files = json.loads((folder / "model.json").read_text())["files"]
    rewrite_info(folder, files=files | {"../secret": {"bytes": 1, "sha256": ""}})
    with pytest.raises(ModelError, match="without folders"):
        load_info(folder)


def test_bytes_that_are_no_graph_are_refused(llama: Case, tmp_path: Path) -> None:
    folder = broken_copy(llama, tmp_path / "m")
    (folder / "model.onnx").write_bytes(b"no graph")
    files = json.loads((folder / "model.json").read_text())["files"]
    sha256 = hashlib.sha256(b"no graph").hexdigest()
    rewrite_info(folder, files=files | {"model.onnx": {"bytes": 8, "sha256": sha256}})
    with pytest.raises(ModelError, match="model.onnx cannot be loaded by onnxruntime"):
        Decoder.load(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere.*does not exist"):
        Decoder.load(tmp_path / "nowhere")


def test_what_is_no_folder_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.GGUF").write_bytes(b"GGUF")
    (tmp_path / "model.bin").write_bytes(b"")
    for found, said in (
        (tmp_path / "model.GGUF", "a GGUF file: give 'fedhlm models export' the Hugging Face model"),
        (tmp_path / "gone.gguf", "a GGUF file: give 'fedhlm models export' the Hugging Face model"),
        (tmp_path / "model.bin", "which is no folder"),
        (Path("http://127.0.0.1:8000/v1"), "a URL: a model is run from a folder of this machine"),
        (Path("HTTPS://host/model.gz"), "a URL: a model is run from a folder of this machine"),
    ):
        with pytest.raises(ModelError, match=r"model folder must be a folder with model\.onnx") as caught:
            load_info(found)
        assert said in str(caught.value)
