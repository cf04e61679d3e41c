"""Models are measured on texts of the user's own: the shipped pair on a few news items."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedhlm.decoding.decoder import Decoder, DecoderInput, read_info
from fedhlm.decoding.models import load_model
from fedhlm.decoding.translated import in_ids_of as agent_model
from fedhlm.errors import DataMissing, ModelError
from fedhlm_fleet.cli import main
from fedhlm_zoo.evaluate import EngineModel, evaluate_texts, in_ids_of, likeness, text_agreement
from fedhlm_zoo.info import write_info
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from fedhlm_zoo.texts import load_texts
from fedhlm_zoo.tokenizer import save_tokenizer, train_tokenizer

SLM, LLM = model_folder("", "slm"), model_folder("", "llm")
TEXTS = [item.body for item in load_items()[:4]]


def test_texts_are_lines_of_json_or_stand_between_blank_lines(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("One text,\non two lines.\n\n \n\nAnother.\n")
    assert load_texts(plain) == ["One text,\non two lines.", "Another."]
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"text": "Oil rises.", "id": 3}\n\n{"title": "Oil", "text": "It rises."}\n{"text": " "}\n')
    assert load_texts(lines) == ["Oil rises.", "Oil\nIt rises."]
    lines.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataMissing, match=r"b\.jsonl line 2 must be a JSON object with a text"):
        load_texts(lines)
    plain.write_text("\n \n")
    with pytest.raises(DataMissing, match="must have at least one text"):
        load_texts(plain)
    plain.write_bytes(b"\xff")
    with pytest.raises(DataMissing, match="it is not UTF-8"):
        load_texts(plain)
    with pytest.raises(DataMissing, match="No such file"):
        load_texts(tmp_path / "none")


def test_perplexity_and_likeness_are_what_they_say() -> None:
    large, small = Decoder.load(LLM), Decoder.load(SLM)
    encoded = [[0, *large.tokenizer.encode(text, add_special_tokens=False).ids] for text in TEXTS]
    nll, same, kl, count = 0.0, 0, 0.0, 0
    for ids in encoded:
        p, q = (_laws(d, ids) for d in (large, small))
        nll -= float(np.log(p[np.arange(len(ids) - 1), ids[1:]]).sum())
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        kl += float((p * (np.log(p) - np.log(q))).sum())
        count += len(ids)
    model, draft = EngineModel(LLM), EngineModel(SLM)
    found = evaluate_texts(model, TEXTS)
    assert (found.texts, found.tokens) == (4, count - 4)
    assert found.perplexity == pytest.approx(math.exp(nll / found.tokens), rel=1e-5)
    near = likeness(draft, model, TEXTS)
    assert near.tokens == count
    assert near.top1 == pytest.approx(same / count, abs=2 / count)  # int8 sums of the SLM differ with the call
    assert near.kl == pytest.approx(kl / count, rel=0.02)
    own = likeness(model, model, TEXTS)
    assert own.top1 == 1.0
    assert own.kl == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ModelError, match="at least two tokens"):
        evaluate_texts(model, [""])


def _laws(decoder: Decoder, ids: list[int]) -> np.ndarray:
    logits = decoder.forward([DecoderInput(decoder.empty_cache(), ids)])[0].logits.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def test_a_target_continues_the_beginnings_of_texts() -> None:
    model = EngineModel(LLM)
    result = text_agreement(model, model, TEXTS[:2], tokens=6)
    assert (result.prompts, result.greedy, result.gumbel, result.greedy_tokens) == (2, 1.0, 1.0, 12)
    assert text_agreement(EngineModel(SLM), model, TEXTS[:2], tokens=6).greedy < 1.0


def test_the_command_measures_a_model_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    arguments = ["models", "evaluate", str(SLM), "--texts", str(file), "--target", str(LLM), "--prompts", "1"]
    assert main(arguments) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["texts"] == "2"
    assert 1.0 < float(shown["perplexity"]) < 1e4
    assert 0.0 < float(shown["kl"]) < 5.0
    assert shown["prompts"] == "1"
    assert main(["models", "evaluate", str(SLM), "--texts", str(tmp_path / "none")]) == 2
    assert "file of texts must be readable" in capsys.readouterr().err


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped SLM with another tokenizer, which gives its ids other meanings."""
    folder = tmp_path_factory.mktemp("foreign") / "slm"
    shutil.copytree(SLM, folder)
    save_tokenizer(train_tokenizer([f"{item.title}\n{item.text}" for item in load_items()], 600), folder)
    write_info(folder, read_info(folder))
    return folder


def test_a_model_is_measured_in_the_ids_of_a_target(foreign: Path) -> None:
    """The translated model is the agent's, and a target of the same ids changes nothing."""
    target, draft = EngineModel(LLM), EngineModel(foreign)
    assert in_ids_of(target, same := EngineModel(SLM)) is same
    translated = in_ids_of(target, draft)
    (ids,) = ([0, *target.tokenizer.encode(text, add_special_tokens=False).ids] for text in TEXTS[:1])
    agent = agent_model(str(LLM), load_model(foreign))
    expected = agent.forward([DecoderInput(agent.empty_cache(), ids)])[0].logits
    np.testing.assert_array_equal(dict(translated.rows([ids]))[0], expected)
    near = likeness(translated, target, TEXTS[:1])
    assert near.tokens == len(ids)
    with pytest.raises(ModelError, match="different vocabularies"):
        likeness(draft, target, TEXTS[:1])


def test_the_command_says_that_it_translates(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "mine.txt").write_text(TEXTS[0])
    arguments = ["models", "evaluate", str(foreign), "--texts", str(file), "--target", str(LLM), "--prompts", "1"]
    assert main(arguments) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["translated"] == f"laws of {foreign} over its 600 ids, into laws over the 4,096 of {LLM}"
    assert 0.0 <= float(shown["greedy"]) <= 1.0
