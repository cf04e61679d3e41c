"""The recipe end to end on tiny models: stages resume, drafts are the teacher's, training is reproducible."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhlm.errors import ConfigError, DataMissing
from fedhlm_zoo.prompts import load_items

torch = pytest.importorskip("torch", reason="trains with torch")
pytest.importorskip("transformers", reason="its models are those of transformers")

from tokenizers import Tokenizer  # noqa: E402

from fedhlm_zoo import train as train_module  # noqa: E402
from fedhlm_zoo.corpus import TOPICS, Article  # noqa: E402
from fedhlm_zoo.drafts import half_greedy, mix, write_drafts  # noqa: E402
from fedhlm_zoo.export import load_torch  # noqa: E402
from fedhlm_zoo.generate import continue_prompts  # noqa: E402
from fedhlm_zoo.recipe import RECIPE, Stage, run_recipe  # noqa: E402
from fedhlm_zoo.train import SHAPES, TOPIC_WEIGHT, Pack, TrainConfig, pack_documents, train  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

SMALL: dict[str, Any] = {"batch": 4, "length": 32, "micro_batch": 2, "compile": False, "precision": "float32"}
TINY = SHAPES["tiny"]
STAGES = (
    Stage(name="words", config=TrainConfig(shape=TINY, steps=3, **SMALL), data="ag"),
    Stage(name="large", config=TrainConfig(shape=TINY, steps=3, seed=3, **SMALL), data="ag+news"),
    Stage(
        name="small",
        config=TrainConfig(shape=TINY, steps=3, **SMALL),
        data="ag+drafts",
        start_from="words",
        teacher="large",
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "ag_news").mkdir()
    with (folder / "ag_news" / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([TOPICS.index(a.topic) + 1, a.title, a.text] for a in load_items())
    return folder


def weights(model_dir: Path) -> dict[str, Any]:
    return dict(load_torch(model_dir).state_dict())


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stages_run_in_order_and_finished_ones_are_kept(data: Path, tmp_path: Path) -> None:
    first = run_recipe(tmp_path, data, recipe=STAGES, vocab_size=300, draft_tokens=600, until="large")
    assert list(first) == ["words", "large"]
    stamp = (first["words"] / "model.safetensors").stat().st_mtime_ns
    done = run_recipe(tmp_path, data, recipe=STAGES, vocab_size=300, draft_tokens=600)
    assert list(done) == ["words", "large", "small"]
    assert (done["words"] / "model.safetensors").stat().st_mtime_ns == stamp
    assert not equal(weights(done["small"]), weights(done["words"]))
    drafts = Pack.load(tmp_path / "pack-drafts-large.npz")
    assert len(drafts.starts) - 1 == 10  # documents of 60 tokens each were expected


def test_an_unknown_last_stage_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be one of words, large, small"):
        run_recipe(tmp_path, data, recipe=STAGES, until="medium")


def test_missing_data_are_reported_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="ag_news"):
        run_recipe(tmp_path / "runs", tmp_path, recipe=STAGES)


def test_the_shipped_recipe_is_consistent() -> None:
    names = [s.name for s in RECIPE]
    assert names[-1] == "slm"
    for i, stage in enumerate(RECIPE):
        assert {stage.start_from, stage.teacher} <= {None, *names[:i]}
        assert (stage.teacher is not None) == (stage.data == "ag+drafts")
        assert stage.config.batch % stage.config.micro_batch == 0


@pytest.fixture(scope="module")
def pack(news_tokenizer: Path) -> Pack:
    tokenizer = Tokenizer.from_file(str(news_tokenizer / "tokenizer.json"))
    return pack_documents(tokenizer, list(load_items()), ["An unlabelled line."])


def test_only_the_topic_name_weighs_more(pack: Pack, news_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_file(str(news_tokenizer / "tokenizer.json"))
    for document in range(200):
        span = slice(pack.starts[document], pack.starts[document + 1])
        heavy = pack.ids[span][pack.weights[span] == TOPIC_WEIGHT]
        assert tokenizer.decode(heavy.tolist()) == f" {load_items()[document].topic}"
        assert pack.ids[span][0] == 0
    assert (pack.weights[pack.starts[200] :] == 1.0).all()


def test_an_interrupted_run_ends_with_the_same_weights(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(shape=TINY, steps=6, checkpoint_every=2, warmup=2, **SMALL)
    whole = train(tmp_path / "whole", config, pack, 512)
    original = train_module.learning_rate

    def interrupt(step: int, config: TrainConfig) -> float:
        if step == 5:
            raise KeyboardInterrupt
        return original(step, config)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", config, pack, 512)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 4
    assert equal(weights(train(tmp_path / "cut", config, pack, 512)), weights(whole))


def test_distillation_brings_the_student_nearer_to_its_teacher(
    pack: Pack, news_model: Callable[[int], Path], tmp_path: Path
) -> None:
    config = TrainConfig(shape=TINY, steps=25, warmup=2, seed=1, **SMALL)
    student = train(tmp_path / "student", config, pack, 512, teacher_dir=news_model(4))
    ids = torch.from_numpy(pack.ids[: 4 * 64].astype(np.int64)).view(4, 64)
    with torch.no_grad():
        target, after = (load_torch(m)(ids).logits.log_softmax(-1) for m in (news_model(4), student))
        before = train_module.new_model(TINY, 512, 1)(ids).logits.log_softmax(-1)
    divergence = [float((target.exp() * (target - x)).sum(-1).mean()) for x in (before, after)]
    assert divergence[1] < 0.9 * divergence[0]


def test_a_micro_batch_must_divide_the_batch(pack: Pack, tmp_path: Path) -> None:
    config = TrainConfig(shape=TINY, steps=1, batch=4, length=32, micro_batch=3)
    with pytest.raises(ConfigError, match="multiple of micro_batch"):
        train(tmp_path / "run", config, pack, 512)


def test_continuations_in_a_batch_equal_those_alone(news_model: Callable[[int], Path]) -> None:
    model = load_torch(news_model(4))
    prompts = [[0, 5, 6], [0, 9], [0, 7, 8], [0, 300, 301], [0, 12]]
    end = continue_prompts(model, prompts, tokens=1, end_id=-1, choose=greedy)[2][0]
    together = continue_prompts(model, prompts, tokens=8, end_id=end, choose=greedy)
    assert together[2] == [end]
    for prompt, ids in zip(prompts, together, strict=True):
        assert continue_prompts(model, [prompt], tokens=8, end_id=end, choose=greedy) == [ids]
        assert len(ids) == 8 or ids[-1] == end


def greedy(logits: Any, _rows: object, _step: int) -> Any:
    return logits.argmax(-1)


def test_half_of_the_drafts_are_greedy_and_half_follow_the_tempered_law() -> None:
    logits = torch.tensor([[0.0, 0.8, 1.6]]).repeat(40_000, 1)
    chosen = half_greedy(torch.Generator().manual_seed(1))(logits, np.arange(40_000), 0)
    assert (chosen[::2] == 2).all()
    shares = np.bincount(chosen[1::2].numpy(), minlength=3) / 20_000
    assert np.abs(shares - torch.softmax(logits[0] / 0.8, 0).numpy()).max() < 0.015


def test_drafts_begin_with_titles(news_model: Callable[[int], Path], news_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_file(str(news_tokenizer / "tokenizer.json"))
    drafts = write_drafts(news_model(4), tokenizer, list(load_items()), tokens=400)
    titles = {a.title for a in load_items()}
    for begin, end in zip(drafts.starts, drafts.starts[1:], strict=False):
        assert drafts.ids[begin] == 0
        assert tokenizer.decode(drafts.ids[begin + 1 : end].tolist()).split("\n")[0] in titles
    assert drafts.starts[-1] == len(drafts.ids) == len(drafts.weights)
    with pytest.raises(DataMissing, match="no article has a title"):
        write_drafts(news_model(4), tokenizer, [Article("", "text", "World")], tokens=10)


def test_a_mixture_is_half_and_half_in_whole_documents() -> None:
    def made(token: int, documents: int) -> Pack:
        return Pack(
            np.tile(np.array([0, token, token], np.uint16), documents),
            np.ones(3 * documents, np.float16),
            np.arange(0, 3 * documents + 1, 3),
        )

    mixed = mix(made(1, 1000), made(2, 10), tokens=1200)
    assert (mixed.ids == 1).sum() == (mixed.ids == 2).sum()
    assert 1200 <= len(mixed.ids) <= 1206
    assert (mixed.ids[mixed.starts[:-1]] == 0).all()
    assert mixed.starts[-1] == len(mixed.ids)
