"""The texts that both models write alone for the requests of a demo, with which its figures are compared."""

from pathlib import Path

from msgspec import structs

from fedhlm.decoding.alone import Alone
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import load_model
from fedhlm.decoding.translated import in_ids_of
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Generation
from fedhlm_fleet.demo.report import Alternatives, Figures, Generated, PresetRun, figures


class Judge:
    """Both models, loaded once; each writes only once for the same prompt and sampling.

    `target` is `agent.target_tokenizer`.

    Raises:
        ModelError: a model folder cannot be used.
    """

    def __init__(self, *, llm: Path, slm: Path, target: str = "") -> None:
        self._large = Alone.load(llm, threads=0)
        self._small = Alone(in_ids_of(target, load_model(slm)))
        self._known: dict[tuple[str, Sampling, int, str], Alternatives] = {}

    def figures(self, run: PresetRun, texts_max: int | None = None) -> Figures:
        """Return the figures of a run, compared with what both models write alone for its requests.

        Only the first `texts_max` continued texts are compared: one takes as long as fifty questions for a topic.
        """
        continued = [i for i, request in enumerate(run.requests) if request.task == "continue"]
        left_out = set() if texts_max is None else set(continued[texts_max:])
        chosen = [i for i in range(len(run.requests)) if i not in left_out]
        return figures(run, {i: self._alone(run.requests[i], run.generation) for i in chosen})

    def kept_and_wrong(self, request: Generated, generation: Generation) -> tuple[int, int]:
        """Score a text with the LLM: how many tokens were kept, and how many of them the LLM would not have written.

        The LLM sees the text as it was written, so a token is judged after the tokens that really precede it.
        """
        kept = [place for place, source in enumerate(request.sources) if not SOURCES[source].verified]
        if not kept:
            return 0, 0
        prompt, decoder = self._large.encode(request.prompt), self._large.decoder
        ids = [*prompt, *request.ids[:-1]]
        logits = decoder.forward([DecoderInput(decoder.empty_cache(), ids, len(request.ids))])[0].logits  # (n, V)
        sampling = generation.sampling(request.seed, temperature=request.temperature)
        settle = COUPLINGS[sampling.coupling].settle
        wrong = sum(
            settle(logits[place], sampling, len(prompt) + place, None, b"") != request.ids[place] for place in kept
        )
        return len(kept), wrong

    def _alone(self, request: Generated, generation: Generation) -> Alternatives:
        # Only gumbel and greedy texts are functions of the seed; for the other couplings the models write a gumbel
        # text.
        coupling = COUPLINGS[generation.coupling].alone
        sampling = structs.replace(
            generation.sampling(request.seed, temperature=request.temperature), coupling=coupling
        )
        wanted = request.prompt, sampling, request.max_tokens, request.task
        if wanted not in self._known:
            prompt = self._large.encode(request.prompt)
            ids = self._large.write(prompt, sampling, request.max_tokens)
            word = self._small.decode(self._small.write(prompt, sampling, 1)) if request.task == "topic" else ""
            self._known[wanted] = Alternatives(ids, self._large.decode(ids), word)
        return self._known[wanted]
