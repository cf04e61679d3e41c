"""What every loaded model must do, whatever runs it. A backend's test file has the fixture `model` and inherits these."""

import asyncio
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_verifier.backends.in_process import threaded
from cloud_verifier.engine import EngineInput, EngineOutput
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.invariance import TOLERANCE, block_difference
from fedhlm.decoding.models import LoadedModel
from fedhlm.decoding.text import TextStream

TEXTS = ("Shares rose on Monday.", "Zürich, Übermut – naïve", "你好，世界", "🙂👩‍🚀 done", "  two  spaces\n\n\ttab")


def resident_bytes() -> int:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


def differs(a: NDArray[Any], b: NDArray[Any]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max(initial=0.0))


class Conformance:
    """Tests of the fixture `model`. Logits that should be equal may differ by `close`."""

    close = 1e-3
    close_of_many = 1e-3  # of 40 texts at once
    sessions = 100  # which leave no memory behind
    grown_bytes = 8 * 2**20  # that may remain after them

    def ids(self, model: LoadedModel, count: int, *, seed: int) -> list[int]:
        drawn: list[int] = np.random.default_rng(seed).integers(0, model.vocabulary.size, count).tolist()
        return drawn

    def ask(self, model: LoadedModel, cache: Any, ids: Sequence[int], rows: int | None = None) -> Any:
        return model.forward([DecoderInput(cache, ids, rows)])[0]

    def scratch(self, model: LoadedModel, ids: Sequence[int], rows: int | None = None) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.ask(model, model.empty_cache(), ids, rows).logits
        return logits

    def test_logits_do_not_depend_on_blocks(self, model: LoadedModel, record_property: Any) -> None:
        difference = block_difference(model)
        record_property("block_difference", difference)
        print(f"logits differ by at most {difference:.2g} between blocks, {TOLERANCE:g} allowed")
        assert difference <= TOLERANCE

    def test_steps_give_the_logits_of_one_call(self, model: LoadedModel) -> None:
        ids, cache, rows = self.ids(model, 12, seed=1), model.empty_cache(), []
        for token in ids:
            result = self.ask(model, cache, [token])
            rows.append(result.logits)
            cache = result.cache
        assert differs(np.concatenate(rows), self.scratch(model, ids)) <= self.close

    def test_the_same_calls_give_the_same_bits(self, model: LoadedModel) -> None:
        ids = self.ids(model, 9, seed=2)

        def once() -> list[NDArray[np.float32]]:
            first = self.ask(model, model.empty_cache(), ids[:6])
            return [first.logits, self.ask(model, first.cache, ids[6:]).logits]

        for one, other in zip(once(), once(), strict=True):
            assert one.tobytes() == other.tobytes()

    def test_a_cut_cache_continues_as_its_prefix(self, model: LoadedModel) -> None:
        ids, other = self.ids(model, 16, seed=3), self.ids(model, 5, seed=4)
        whole = self.ask(model, model.empty_cache(), ids).cache
        for kept in (16, 15, 7, 1, 0):
            cut = whole.truncated(kept)
            expected = self.scratch(model, [*ids[:kept], *other])[kept:]
            assert differs(self.ask(model, cut, other).logits, expected) <= self.close

    @pytest.mark.parametrize("length", [-1, 17])
    def test_a_cache_cannot_be_cut_to_what_it_does_not_hold(self, model: LoadedModel, length: int) -> None:
        cache = self.ask(model, model.empty_cache(), self.ids(model, 16, seed=3), 0).cache
        with pytest.raises(ValueError, match=f"cache cannot be cut to {length} tokens: it holds 16"):
            cache.truncated(length)

    def test_caches_are_values(self, model: LoadedModel) -> None:
        """What a cache has been continued with, or cut to, changes nothing of it."""
        ids = self.ids(model, 10, seed=5)
        tails = [self.ids(model, 4, seed=seed) for seed in (6, 7, 8)]
        stem = self.ask(model, model.empty_cache(), ids).cache
        for tail in tails:
            self.ask(model, stem, tail)
            self.ask(model, stem.truncated(3), tail)
        results = model.forward([DecoderInput(stem, tail) for tail in tails])  # several from one
        for tail, result in zip(tails, results, strict=True):
            assert differs(result.logits, self.scratch(model, [*ids, *tail])[10:]) <= self.close
        for tail, result in zip(tails, results, strict=True):
            expected = self.scratch(model, [*ids, *tail, 5])[-1:]
            assert differs(self.ask(model, result.cache, [5]).logits, expected) <= self.close

    def test_a_batch_gives_what_single_calls_give(self, model: LoadedModel) -> None:
        pasts, lengths, rows = (0, 7, 1, 12, 0), (5, 1, 8, 3, 1), (5, 1, 2, 0, 1)
        texts = [self.ids(model, past + length, seed=past) for past, length in zip(pasts, lengths, strict=True)]
        caches = [
            self.ask(model, model.empty_cache(), text[:past], 0).cache if past else model.empty_cache()
            for text, past in zip(texts, pasts, strict=True)
        ]
        requests = [
            DecoderInput(cache, text[past:], wanted)
            for cache, text, past, wanted in zip(caches, texts, pasts, rows, strict=True)
        ]
        together, alone = model.forward(requests), [model.forward([request])[0] for request in requests]
        for text, wanted, one, other in zip(texts, rows, together, alone, strict=True):
            assert one.logits.shape == (wanted, model.vocabulary.size)
            assert one.logits.dtype == np.float32
            assert differs(one.logits, other.logits) <= self.close
            assert differs(one.logits, self.scratch(model, text)[len(text) - wanted :]) <= self.close
            if one.hidden is not None and other.hidden is not None:
                assert one.hidden.shape == (wanted, model.info.hidden_size)
                assert differs(one.hidden, other.hidden) <= self.close

    def test_many_caches_live_at_once(self, model: LoadedModel) -> None:
        texts = [self.ids(model, 4, seed=seed) for seed in range(40)]
        caches = [self.ask(model, model.empty_cache(), text[:3], 0).cache for text in texts]
        for number in (39, 0, 20, 0, 39):
            expected = self.scratch(model, texts[number])[3:]
            assert differs(self.ask(model, caches[number], texts[number][3:]).logits, expected) <= self.close
        batch = model.forward([DecoderInput(c, t[3:]) for c, t in zip(caches, texts, strict=True)])
        for text, result in zip(texts, batch, strict=True):
            assert differs(result.logits, self.scratch(model, text)[3:]) <= self.close_of_many

    def test_the_context_ends_where_it_says(self, model: LoadedModel) -> None:
        context = model.info.context
        ids = self.ids(model, context, seed=9)
        cache = self.ask(model, model.empty_cache(), ids[:-1], 0).cache
        last = self.ask(model, cache, ids[-1:])
        assert np.isfinite(last.logits).all()
        with pytest.raises(ValueError, match=f"cache and ids must be at most {context} tokens"):
            self.ask(model, last.cache, [1])
        again = self.ask(model, cache, ids[-1:])
        assert differs(again.logits, last.logits) <= self.close

    def test_wrong_ids_are_refused_and_nothing_breaks(self, model: LoadedModel) -> None:
        size = model.vocabulary.size
        cache = self.ask(model, model.empty_cache(), [1, 2], 0).cache
        for wrong in ([], [size], [-1]):
            with pytest.raises(ValueError, match="ids"):
                self.ask(model, cache, wrong)
        assert differs(self.ask(model, cache, [3]).logits, self.scratch(model, [1, 2, 3])[2:]) <= self.close

    def test_ended_sessions_leave_no_memory_behind(self, model: LoadedModel) -> None:
        def session(seed: int) -> None:
            ids = self.ids(model, 6, seed=seed)
            first = self.ask(model, model.empty_cache(), ids[:4], 1)
            self.ask(model, first.cache.truncated(2), ids[4:], 1)

        for seed in range(self.sessions // 5):
            session(seed)
        before = resident_bytes()
        for seed in range(self.sessions):
            session(seed)
        assert resident_bytes() - before < self.grown_bytes

    def test_texts_come_back_from_their_ids(self, model: LoadedModel) -> None:
        for text in TEXTS:
            ids = model.tokenizer.encode(text, add_special_tokens=False).ids
            assert max(ids) < model.vocabulary.size
            stream = TextStream(model.tokenizer)
            shown = "".join(stream.push([token]) for token in ids) + stream.push([], last=True)
            assert shown.strip() == text.strip()

    async def test_a_cancelled_call_breaks_nothing(self, model: LoadedModel) -> None:
        ids = self.ids(model, 8, seed=11)
        expected = self.scratch(model, ids)
        async with threaded(model) as engine:
            call = asyncio.ensure_future(engine.forward([EngineInput(engine.empty_cache, ids, 8)]))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            result = (await engine.forward([EngineInput(engine.empty_cache, ids, 8)]))[0]
        assert isinstance(result, EngineOutput)
        assert differs(result.logits, expected) <= self.close
