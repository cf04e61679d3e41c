"""Texts under a grammar: always of the grammar, whatever is asked in which order, and the LLM's own under the mask."""

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fedhlm.decoding.alone import Alone
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.grammar import FORBIDDEN, Constraint, Grammars, nothing_constrains, of_regex, of_schema
from fedhlm.decoding.sampling import law
from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.errors import GrammarError
from fedhlm.protocol.messages import Grammar, Sampling
from fedhlm_zoo.shipped import ARTEFACTS, model_folder

EOS = 0
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["world", "sports", "business"]},
        "sure": {"type": "boolean"},
        "year": {"type": "integer", "minimum": 0, "maximum": 2_100},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 6, "pattern": "^[a-z]+$"}, "maxItems": 2},
    },
    "required": ["topic", "sure", "year", "words"],
    "additionalProperties": False,
}
SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["id", "on"],
    "additionalProperties": False,
}
SAMPLED = Sampling(3, 0.8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ARTEFACTS / "llm" / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.get_vocab_size(), {EOS})


@pytest.fixture(scope="module")
def llm() -> Alone:
    return Alone.load(model_folder("", "llm"), threads=1)


def possible(held: Constraint, ids: list[int], size: int) -> list[int]:
    return np.flatnonzero(held.masked(np.zeros(size, np.float32), ids) == 0.0).tolist()


@given(numbers=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6), cut=st.randoms(use_true_random=False))
def test_a_mask_depends_on_the_ids_alone(grammars: Grammars, numbers: list[int], cut: random.Random) -> None:
    """Asked forwards, backwards and across other texts, one constraint says what a new one says."""
    grammar, size = Grammar(2, of_schema(SCHEMA)), 4_096
    old, asked = grammars.constrain(grammar), []
    for number in numbers:
        rng, ids = random.Random(number), [5, 7]
        new = grammars.constrain(grammar)
        for _ in range(12):
            allowed = possible(new, ids, size)
            asked.append((list(ids), allowed))
            ids.append(rng.choice(allowed))
            if ids[-1] == EOS:
                break
    cut.shuffle(asked)
    for ids, allowed in asked:
        assert possible(old, ids, size) == allowed


def test_every_text_is_of_its_grammar(llm: Alone) -> None:
    prompt = llm.encode("Oil prices rise\n")
    for seed in range(4):
        sampling = Sampling(seed, 1.2, grammar=Grammar(len(prompt), of_schema(SCHEMA)))
        jsonschema.validate(json.loads(llm.decode(llm.write(prompt, sampling, 200))), SCHEMA)
    dates = Sampling(1, 0.8, grammar=Grammar(len(prompt), of_regex(r"[0-9]{4}/[0-9]{2}")))
    ids = llm.write(prompt, dates, 40)
    assert re.fullmatch(r"\d{4}/\d{2}", llm.decode(ids))
    assert ids[-1] == EOS


def test_a_thousand_random_texts_are_valid_whatever_the_model_wants(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Models of all opinions: random logits in place of an LLM."""
    grammar, rng = Grammar(1, of_schema(SMALL)), np.random.default_rng(4)
    table = rng.normal(0.0, 4.0, (64, 4_096)).astype(np.float32)
    for number in range(1_000):
        held, ids = grammars.constrain(grammar), [9]
        sampling = Sampling(number, [0.0, 0.8, 10.0][number % 3], grammar=grammar)
        while ids[-1] != EOS:
            row = held.masked(table[hash(tuple(ids)) % len(table)], ids)
            ids.append(COUPLINGS["gumbel"].settle(row, sampling, len(ids), None, b""))
            assert len(ids) < 60
        jsonschema.validate(json.loads(tokenizer.decode(ids[1:], skip_special_tokens=True)), SMALL)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.8, 10.0])
def test_a_draft_is_possible_and_its_figures_are_those_of_the_masked_law(
    grammars: Grammars, coupling: str, temperature: float
) -> None:
    grammar = Grammar(0, of_regex("[ab]c"))
    held = grammars.constrain(grammar)
    logits = np.random.default_rng(1).normal(0.0, 3.0, 4_096).astype(np.float32)
    sampling = Sampling(5, temperature, coupling=coupling, grammar=grammar)
    row, allowed = held.masked(logits, []), possible(held, [], 4_096)
    assert 1 < len(allowed) < 10
    token, prob, encoded = COUPLINGS[coupling].draft(row, sampling, 0)
    assert token in allowed
    assert 0.0 < prob <= 1.0
    assert COUPLINGS[coupling].settle(row, sampling, 0, token, encoded) in allowed
    assert law(row, sampling)[[i for i in range(4_096) if i not in allowed]].sum() == 0.0
    for doubt in UNCERTAINTIES.values():
        assert 0.0 <= doubt(row, token, sampling, 0) <= 1.0


def test_where_one_token_is_possible_there_is_no_doubt(grammars: Grammars) -> None:
    held = grammars.constrain(Grammar(0, of_regex("a")))
    logits = np.zeros(4_096, np.float32)
    (first,) = possible(held, [], 4_096)
    assert possible(held, [first], 4_096) == [EOS]
    row = held.masked(logits, [])
    assert max(doubt(row, first, SAMPLED, 0) for doubt in UNCERTAINTIES.values()) < 1e-12


def test_ids_that_have_left_the_grammar_are_not_masked_and_coming_back_is_possible(grammars: Grammars) -> None:
    held = grammars.constrain(Grammar(1, of_regex("ab")))
    before = possible(held, [9], 4_096)
    assert len(possible(held, [9, 500, 501], 4_096)) == 4_096
    assert possible(held, [9], 4_096) == before
    assert FORBIDDEN in held.masked(np.zeros(4_096, np.float32), [9])


@pytest.mark.parametrize("source", ["start: nothing", "start: /(/", "", 'start: %json {"type": "nonsense"}', "{"])
def test_a_wrong_grammar_is_an_error_that_says_where(grammars: Grammars, source: str) -> None:
    with pytest.raises(GrammarError, match=r"grammar must be one that llguidance reads \(got .+\)"):
        grammars.constrain(Grammar(0, source))


def test_a_model_that_cannot_end_a_text_holds_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="end-of-text"):
        Grammars(tokenizer, 4_096, ()).constrain(Grammar(0, "start: /a/"))
    with pytest.raises(GrammarError):
        nothing_constrains(Grammar(0, "start: /a/"))
