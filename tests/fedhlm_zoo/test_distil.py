"""A draft model is made of a tiny large one: it learns its laws, a stopped run goes on, and the draft is a usable file."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedhlm.decoding.chat import TurnIds
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import load_model
from fedhlm.errors import ConfigError, DataMissing, ModelError

torch = pytest.importorskip("torch", reason="trains with torch")
pytest.importorskip("gguf", reason="reads GGUF files into torch")

from fedhlm_zoo import conversations, gguf_weights, teaching  # noqa: E402
from fedhlm_zoo.distil import CARD_FILE, DistilConfig, chosen_layers, distil, losses_of, parts_of, pruned  # noqa: E402
from fedhlm_zoo.export import load_torch  # noqa: E402
from fedhlm_zoo.prompts import load_items  # noqa: E402
from fedhlm_zoo.teaching import LawLessons  # noqa: E402
from fedhlm_zoo.tiny import make_tiny  # noqa: E402
from tests.fedhlm.decoding.ggufs import tiny_gguf  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

torch.set_num_threads(1)

END = 0
TURNS = TurnIds((END,), (1, 2), (3, 4))
OPTIONS: dict[str, Any] = {
    "layers": (0,),
    "tokens": 2048,
    "batch": 8,
    "micro_batch": 4,
    "length": 32,
    "precision": "float32",
    "warmup": 4,
    "checkpoint_every": 10,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("large") / "tiny.gguf")


def made(large: Path, out: Path, **options: Any) -> Any:
    config = DistilConfig(**(OPTIONS | {"steps": 40} | options))
    return distil(large, out, config, turns=TURNS, end_ids=(END,), texts=[])


@pytest.fixture(scope="module")
def whole(large: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("whole")
    return out, made(large, out)


def weights(folder: Path) -> dict[str, Any]:
    return dict(load_torch(folder).state_dict())


def test_loss_falls_and_the_large_model_accepts_more_drafts(whole: tuple[Path, Any]) -> None:
    out, done = whole
    losses = [msgspec.json.decode(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert done.accepted > done.untrained
    card = (done.folder / CARD_FILE).read_text()
    assert f"{done.untrained:.3f} before the training, {done.accepted:.3f} after it" in card


def test_a_stopped_run_goes_on_to_the_same_weights(large: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    stop = DistilConfig(**OPTIONS, steps=40)

    class Stopped(Exception):
        pass

    from fedhlm_zoo import train as train_module

    kept = train_module._save

    def save(path: Path, *given: Any) -> None:
        kept(path, *given)
        if given[-1] == 20:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "_save", save)
        with pytest.raises(Stopped):
            distil(large, tmp_path, stop, turns=TURNS, end_ids=(END,), texts=[])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "lessons").iterdir()}
    done = made(large, tmp_path)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    ours, theirs = weights(done.folder), weights(whole[1].folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_draft_is_a_gguf_file_that_llama_cpp_runs(whole: tuple[Path, Any], large: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: a draft runs on it")
    _, done = whole
    student = load_torch(done.folder)
    exact = gguf_weights.write(tmp_path / "exact.gguf", large, student, name="draft", form="F32")
    ids = np.random.default_rng(0).integers(1, 4096, 24).tolist()
    with torch.inference_mode():
        expected = student(torch.tensor([ids])).logits[0].numpy()
    loaded = load_model(exact)
    found = loaded.forward([DecoderInput(loaded.empty_cache(), ids)])[0].logits
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    shipped = load_model(done.file)
    assert shipped.info.layers == 1
    assert shipped.vocabulary == load_model(large).vocabulary
    # The folder of the draft speaks as the file does.
    assert load_model(done.folder).vocabulary == shipped.vocabulary


def test_weights_of_a_gguf_file_are_those_that_llama_cpp_computes_with(large: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: weights are compared with its own")
    model, ids = load_torch(large), list(range(7, 31))
    loaded = load_model(large)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = loaded.forward([DecoderInput(loaded.empty_cache(), ids)])[0].logits
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_hugging_face_folder_gives_a_folder(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "large", seed=3)
    done = distil(
        source,
        tmp_path / "out",
        DistilConfig(**OPTIONS, steps=2),
        turns=TURNS,
        end_ids=(END,),
        texts=[item.body for item in load_items()[:4]],
    )
    assert done.file is None
    assert load_model(done.folder).vocabulary == load_model(source).vocabulary
    assert sorted(path.name for path in (tmp_path / "out" / "lessons").iterdir()) == [
        "examined.npz",
        "given-0000.npz",
        "written-0000.npz",
    ]


def test_a_run_keeps_its_recipe_and_takes_more_steps_in_other_arithmetic(large: Path, whole: tuple[Path, Any]) -> None:
    out, _ = whole
    with pytest.raises(ConfigError, match="begun with the same model, texts and options"):
        made(large, out, layers=(1,))
    before = weights(out / "model")
    more = made(large, out, steps=44, precision="bfloat16")
    assert not all(torch.equal(before[name], value) for name, value in weights(more.folder).items())


def test_what_cannot_be_distilled_is_said(large: Path, exported: Any, tmp_path: Path) -> None:
    config = DistilConfig(**OPTIONS, steps=1)
    with pytest.raises(ModelError, match="must be a Hugging Face folder or a GGUF file"):
        distil(exported("llama")[1], tmp_path, config, turns=TURNS, end_ids=(END,), texts=[])
    with pytest.raises(DataMissing, match="at least 32 tokens"):
        distil(large, tmp_path / "few", config, turns=TURNS, end_ids=(END,), texts=["one"])
    with pytest.raises(ConfigError, match="from 1 to 2"):
        chosen_layers(2, 3)
    with pytest.raises(ConfigError, match="ascending numbers from 0 to 1"):
        pruned(load_torch(large), (1, 0))


def lessons(model: Any, *, rows: int = 3) -> LawLessons:
    ids = np.random.default_rng(1).integers(1, 4096, (rows, 12))
    return teaching.laws_at(
        model, conversations.Rows(ids, np.ones_like(ids, np.bool_)), temperature=0.8, vocabulary=4096
    )


def test_laws_kept_while_writing_are_those_read_afterwards(large: Path) -> None:
    model = load_torch(large)
    written = teaching.Teacher(model, TURNS, (END,), 4096, 0.8).write(0, 24, 5, rows=6)
    rows = conversations.Rows(written.ids, np.ones_like(written.ids, np.bool_))
    read = teaching.laws_at(model, rows, temperature=0.8, vocabulary=4096)
    counted = written.counted
    assert counted.sum() > 50
    assert not counted[:, -1].any()
    assert np.array_equal(written.likeliest[counted][:, :8], read.likeliest[counted][:, :8])
    for kept, expected in ((written.ln_p, read.ln_p), (written.hidden, read.hidden)):
        assert np.allclose(kept[counted], expected[counted], atol=1e-4)


def test_with_all_tokens_as_candidates_the_loss_is_the_divergence_of_the_laws(large: Path) -> None:
    model = load_torch(large)
    held, student = lessons(model), pruned(model, (0,))
    (part,) = parts_of(held, rows=3, vocabulary=4096, negatives=4096, seed=(0, 0))
    hidden = student.base_model(part.ids).last_hidden_state
    kl, _ = losses_of(hidden, student.get_output_embeddings(), part, temperature=0.8)
    with torch.inference_mode():
        p, q = (torch.softmax(m(part.ids).logits[:, :-1].double() / 0.8, -1) for m in (model, student))
    likeliest = part.likeliest[:, :-1]
    p_kept, q_kept = p.gather(2, likeliest), q.gather(2, likeliest)
    p_rest, q_rest = 1 - p_kept.sum(-1), 1 - q_kept.sum(-1)
    expected = (p_kept * (p_kept / q_kept).log()).sum() + (p_rest * (p_rest / q_rest).log()).sum()
    assert float(kl.detach()) == pytest.approx(float(expected), rel=1e-3)


def test_few_candidates_estimate_the_loss_without_bias(large: Path) -> None:
    model = load_torch(large)
    held, student = lessons(model), pruned(model, (0,))
    head = student.get_output_embeddings()

    def loss(negatives: int, seed: int) -> float:
        (part,) = parts_of(held, rows=3, vocabulary=4096, negatives=negatives, seed=(seed, 0))
        with torch.inference_mode():
            hidden = student.base_model(part.ids).last_hidden_state
            return float(losses_of(hidden, head, part, temperature=0.8)[0])

    exact = loss(4096, 0)
    estimates = [loss(1024, seed) for seed in range(8)]
    assert np.std(estimates) > 0
    assert np.mean(estimates) == pytest.approx(exact, rel=0.1)


def test_conversations_take_turns_and_mark_what_the_template_writes(large: Path) -> None:
    model = load_torch(large)
    rows = conversations.converse(model, TURNS, (END,), rows=4, length=200, seed=1, temperature=0.8, vocabulary=4096)
    assert (rows.ids[:, 0] == END).all()
    assert not rows.written[:, 0].any()
    for ids, written in zip(rows.ids.tolist(), rows.written.tolist(), strict=True):
        assert END not in ids[1:]  # the template's ids take its place
        (first, second) = TURNS.answer
        begun = [at for at in range(199) if ids[at : at + 2] == [first, second] and not written[at + 1]]
        assert begun, "a user's turn ends after QUESTION_MAX tokens at the latest"
        assert begun[0] <= 1 + conversations.QUESTION_MAX
    again = conversations.converse(model, TURNS, (END,), rows=4, length=200, seed=1, temperature=0.8, vocabulary=4096)
    assert np.array_equal(rows.ids, again.ids)
