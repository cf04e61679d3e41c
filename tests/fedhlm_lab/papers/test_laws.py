"""Cached laws: exactly what the models say, kept by models and prompts, computed again where they are not whole."""

from pathlib import Path

import numpy as np
import pytest

from edge_agent.model import Slm
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import Decoder
from fedhlm.errors import FedhlmError
from fedhlm.peers.context_keys import load_projection
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.papers.laws import FACTS, DecoderLaws, LawPrompt, LawRows, Laws, ToyLaws, facts_of
from fedhlm_lab.sim import toy
from fedhlm_zoo.shipped import model_folder

PROMPTS = [LawPrompt((1, 2, 3)), LawPrompt((4, 5, 6, 7), 3)]


class Counted(ToyLaws):
    """A toy that counts its calls."""

    calls = 0

    def after(self, prompt: LawPrompt) -> LawRows:
        Counted.calls += 1
        return super().after(prompt)


def test_rows_are_the_models_logits_and_come_from_the_disk_the_second_time(tmp_path: Path) -> None:
    small, large = Counted(0.8), Counted()
    Counted.calls = 0
    laws = Laws.load_or_compute(tmp_path, PROMPTS, small, large)
    assert Counted.calls == 4
    assert laws.first.tolist() == [0, 1]
    assert laws.small.dtype == np.float32
    for row, context in enumerate([(1, 2, 3), (4, 5), (4, 5, 6), (4, 5, 6, 7)]):
        np.testing.assert_array_equal(laws.large[row], toy.large_logits(context).astype(np.float32))
        np.testing.assert_array_equal(laws.small[row], toy.small_logits(context, 0.8).astype(np.float32))
        assert laws.keys[row].tobytes() == toy.key_of(context)
    again = Laws.load_or_compute(tmp_path, PROMPTS, small, large)
    assert Counted.calls == 4
    np.testing.assert_array_equal(again.large, laws.large)


def test_other_models_or_prompts_have_laws_of_their_own() -> None:
    others = (
        PROMPTS,
        PROMPTS[:1],
        PROMPTS[::-1],
        [PROMPTS[0], LawPrompt(PROMPTS[1].ids, 2)],
        [LawPrompt((1, 2)), LawPrompt((3,))],
    )
    names = [facts_of(prompts, ToyLaws(a), ToyLaws()).digest for a in (0.8, 0.9) for prompts in others]
    assert len(set(names)) == len(names) == 10


def test_a_folder_that_was_not_finished_is_computed_again(tmp_path: Path) -> None:
    laws = Laws.load_or_compute(tmp_path, PROMPTS, ToyLaws(0.8), ToyLaws())
    folder = tmp_path / laws.facts.digest
    (folder / FACTS).unlink()
    np.save(folder / "large.npy", np.zeros((4, toy.VOCAB_SIZE), np.float32))
    again = Laws.load_or_compute(tmp_path, PROMPTS, ToyLaws(0.8), ToyLaws())
    assert again.large.any()


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedhlmError, match="at least one"):
        facts_of([], ToyLaws(0.8), ToyLaws())
    with pytest.raises(FedhlmError, match="as many as they have ids"):
        facts_of([LawPrompt((1, 2), 3)], ToyLaws(0.8), ToyLaws())
    (tmp_path / "file").write_text("")
    with pytest.raises(FedhlmError, match="cannot be used"):
        Laws.load_or_compute(tmp_path / "file", PROMPTS, ToyLaws(0.8), ToyLaws())


def test_the_shipped_slm_says_what_an_agent_drafts_from() -> None:
    folder = model_folder("", "slm")
    decoder = Decoder.load(folder, threads=1)
    projection = load_projection(folder, decoder.info.hidden_size)
    ids = (0, 40, 41, 42, 43, 44, 45)
    rows = DecoderLaws(decoder, projection, stepwise=True).after(LawPrompt(ids, 3))
    slm, sampling = Slm(decoder, projection), Sampling(7, 0.8, 1.0, "full")
    for place, end in enumerate((5, 6, 7)):
        drawn = slm.draft(ids[:end], sampling)
        token, prob, law = COUPLINGS["full"].draft(rows.logits[place], sampling, end)
        assert (drawn.token, drawn.prob, drawn.law) == (token, prob, law)
        assert drawn.key == rows.keys[place].tobytes()
