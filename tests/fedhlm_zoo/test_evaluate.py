"""Measurements agree between torch and ONNX, and with what they claim to measure."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fedhlm.errors import ModelError
from fedhlm_zoo.evaluate import Model, agreement, evaluate, open_model, sample
from fedhlm_zoo.prompts import load_items

torch = pytest.importorskip("torch", reason="makes its models with torch")
pytest.importorskip("optimum.exporters.onnx", reason="exports its models with optimum")

from fedhlm_zoo.export import export, load_torch  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

ITEMS = sample([a for a in load_items() if len(a.body) < 170], 24)


@pytest.fixture(scope="module")
def both(news_model: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    folder = tmp_path_factory.mktemp("onnx")
    export(news_model(1), folder)
    return open_model(news_model(1)), open_model(folder)


def test_torch_and_onnx_give_the_same_figures(both: tuple[Model, Model]) -> None:
    first, second = (evaluate(m, ITEMS) for m in both)
    assert (first.articles, first.tokens, first.topic_accuracy) == (24, second.tokens, second.topic_accuracy)
    assert first.perplexity == pytest.approx(second.perplexity, rel=1e-4)


def test_perplexity_is_torchs_loss_of_the_body(both: tuple[Model, Model], news_model: Callable[[int], Path]) -> None:
    item = ITEMS[0]
    ids = torch.tensor([[0, *both[0].tokenizer.encode(item.body).ids]])
    with torch.no_grad():
        loss = load_torch(news_model(1))(ids, labels=ids).loss
    assert evaluate(both[1], [item]).perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_accuracy_counts_the_likeliest_of_the_four_topics(both: tuple[Model, Model]) -> None:
    answers = [t for t in ("World", "Sports", "Business", "Technology") if _accuracy_as(both[1], t) == 1.0]
    assert len(answers) == 1
    assert all(_accuracy_as(both[1], t) == 0.0 for t in {"World", "Sports", "Business", "Technology"} - set(answers))


def _accuracy_as(model: Model, topic: str) -> float:
    return evaluate(model, [ITEMS[0]._replace(topic=topic)]).topic_accuracy


def test_a_model_agrees_with_itself_and_its_onnx_form(both: tuple[Model, Model]) -> None:
    result = agreement(both[0], both[0], ITEMS[:6], tokens=12)
    assert (result.greedy, result.gumbel, result.prompts) == (1.0, 1.0, 6)
    assert 6 <= result.greedy_tokens <= 72
    across = agreement(both[1], both[0], ITEMS[:6], tokens=12)
    assert (across.greedy, across.gumbel) == (1.0, 1.0)
    back = agreement(both[0], both[1], ITEMS[:6], tokens=12)
    assert back == across


def test_another_model_agrees_less(both: tuple[Model, Model], news_model: Callable[[int], Path]) -> None:
    result = agreement(open_model(news_model(2)), both[0], ITEMS[:6], tokens=12)
    assert result.greedy < 0.9
    assert result.gumbel < 0.9


def test_models_whose_ids_differ_are_not_compared(
    both: tuple[Model, Model], exported: Callable[[str], tuple[Path, Path]]
) -> None:
    with pytest.raises(ModelError, match="different vocabularies"):
        agreement(both[0], open_model(exported("llama")[1]), ITEMS[:2])


def test_a_tokenizer_that_confuses_the_topics_is_refused(exported: Callable[[str], tuple[Path, Path]]) -> None:
    with pytest.raises(ModelError, match="must be four different ones"):
        evaluate(open_model(exported("llama")[1]), ITEMS[:2])


def test_a_torch_directory_needs_a_tokenizer(
    news_model: Callable[[int], Path], news_tokenizer: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((news_model(1) / name).read_bytes())
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        open_model(tmp_path)
    assert open_model(tmp_path, tokenizer=news_tokenizer).end_id == 0


def test_samples_are_reproducible_and_whole_when_no_count_is_given() -> None:
    items = load_items()
    assert sample(items, 30, seed=1) == sample(items, 30, seed=1) != sample(items, 30, seed=2)
    assert sample(items, None) == list(items) == sample(items, 500)
    assert len(set(sample(items, 30))) == 30
