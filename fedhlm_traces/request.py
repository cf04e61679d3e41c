"""One request in progress: its escalations, its verdicts, and the story of its committed tokens.

The module is pure. A verdict is matched with its output by the tokens themselves; what cannot be matched stays
unknown.
"""

from typing import Final, NamedTuple

import msgspec

from fedhlm.errors import ProtocolError
from fedhlm.protocol.fields import FinishReason, Source
from fedhlm.protocol.messages import Escalation, Output, Prompt, UncertainTokens, Verdict
from fedhlm.protocol.packing import unpack_bits, unpack_probs
from fedhlm_traces.decoded import unpacked_ids

VERDICTS_MAX: Final = 256


class Step(msgspec.Struct, kw_only=True):
    """One committed token; `index` counts the request's generated tokens from 0.

    `draft` is the SLM's own token, `standing` the peers' proposal that replaced it in the block (cosine similarity 1
    - `score`). `escalate` is the gate's decision, `sent` whether a draft went up. `latency_s` runs on the recorder's
    clock from the escalation that first carried or requested the token to the verdict that settled it.

    `target_prob` is the cloud's probability of the draft. `missed` says that the cloud would have written another
    token.
    """

    index: int
    token: int
    source: Source
    at_s: float
    draft: int | None = None
    standing: int | None = None
    uncertainty: float | None = None
    escalate: bool | None = None
    score: float | None = None
    sent: bool = False
    latency_s: float | None = None
    target_prob: float | None = None
    missed: bool | None = None


class Story(msgspec.Struct, kw_only=True):
    """One request. `session`, `prompt_tokens` and `tau` are None if the recording does not tell.

    `finish` is None if the end is missing. With `journal` the decisions are the agent's own notes. `notes` say what
    is missing.
    """

    agent: str
    cluster: str = ""
    request: str = ""
    prompt: str | None = None
    session: int | None = None
    prompt_tokens: int | None = None
    tau: float | None = None
    journal: bool = False
    began_s: float = 0.0
    ended_s: float = 0.0
    finish: FinishReason | None = None
    error: str = ""
    steps: list[Step] = []
    notes: list[str] = []


class _Draft(NamedTuple):
    token: int
    sent_s: float
    uncertainty: float | None


class _EscalatedBlock(NamedTuple):
    sent_s: float
    ids: list[int]
    fixed: int


class _Settled(NamedTuple):
    at_s: float
    epoch: int
    base: int
    tokens: list[int]  # ids from `base` on
    source: Source
    relayed: bool  # only seen between agent and edge


class _Scored(NamedTuple):
    token: int
    prob: float
    missed: bool | None


class Run:
    """A request in progress: its story so far, its escalations, and the verdicts not yet used."""

    def __init__(self, agent: str, at_s: float) -> None:
        self.story = Story(agent=agent, began_s=at_s, ended_s=at_s, steps=[], notes=[])
        self.prompt: Prompt | None = None
        self.count = 0  # committed tokens
        self._tail: dict[int, _Draft] = {}
        self._doubts: dict[int, tuple[int, float]] = {}
        self._blocks: dict[tuple[int, int], _EscalatedBlock] = {}
        self._settled: list[_Settled] = []
        self._scored: dict[int, _Scored] = {}

    def escalated(self, message: Escalation, at_s: float, vocab_size: int | None, *, relayed: bool) -> None:
        key = message.epoch, message.base
        known = self._blocks.get(key)
        ids = unpacked_ids(message.ids, vocab_size)
        if ids is None:
            self._note("ids of unknown vocabulary")
        if ids is None or (relayed and known is not None):
            return
        if message.epoch == 0 and message.prime is not None:
            self.story.prompt_tokens = message.base  # nothing is settled yet, so the block follows the prompt
        # A block that is sent again may have grown.
        sent_s = at_s if known is None else known.sent_s
        if known is None or len(ids) >= len(known.ids):
            self._blocks[key] = _EscalatedBlock(sent_s, ids, message.fixed)
        for position, token in enumerate(ids[message.fixed :], start=message.base + message.fixed):
            if position not in self._tail or self._tail[position].token != token:
                doubted, uncertainty = self._doubts.get(position, (None, None))
                self._tail[position] = _Draft(token, at_s, uncertainty if doubted == token else None)

    def doubted(self, message: UncertainTokens) -> None:
        self._doubts |= {item.position: (item.token, item.uncertainty) for item in message.items}

    def answered(self, verdict: Verdict, at_s: float, vocab_size: int | None, *, relayed: bool) -> None:
        block = self._blocks.get((verdict.epoch, verdict.base))
        ids = unpacked_ids(verdict.ids, vocab_size)
        if verdict.status != "settled" or ids is None or block is None or verdict.accepted > len(block.ids):
            return
        tokens = block.ids[: verdict.accepted] + ids
        self._settled.append(_Settled(at_s, verdict.epoch, verdict.base, tokens, verdict.source, relayed))
        del self._settled[:-VERDICTS_MAX]
        try:
            probs = [float(p) for p in unpack_probs(verdict.target_probs)]
        except ProtocolError:
            probs = []
        missed = unpack_bits(verdict.missed, block.fixed)
        for i, (token, prob) in enumerate(zip(block.ids, probs, strict=False)):
            self._scored[verdict.base + i] = _Scored(token, prob, missed[i] if i < block.fixed else None)

    def committed(self, output: Output, at_s: float) -> None:
        """Add the tokens of an output that follows all before; a note tells of a gap."""
        if output.position > self.count:
            self._note(f"tokens {self.count} to {output.position - 1} are not in the recording")
        self.count = output.position
        first = None if self.story.prompt_tokens is None else self.story.prompt_tokens + output.position
        sources = set(output.sources)
        settled = None
        if first is not None and len(sources) == 1:
            settled = self._settled_by(first, list(output.ids), sources.pop())
        for token, source in zip(output.ids, output.sources, strict=False):
            step = Step(index=self.count, token=token, source=source, at_s=at_s)
            if self.story.prompt_tokens is not None:
                self._explain(step, self.story.prompt_tokens + self.count, settled)
            self.story.steps.append(step)
            self.count += 1
        if first is not None and output.ids:
            end = first + len(output.ids)
            self._settled = [s for s in self._settled if s.base + len(s.tokens) > end]

    def _explain(self, step: Step, position: int, settled: _Settled | None) -> None:
        draft = self._tail.pop(position, None)
        if draft is not None:
            step.draft, step.sent = draft.token, True
            step.uncertainty = draft.uncertainty
            step.escalate = None if draft.uncertainty is None else True
            if draft.token != step.token:
                self._tail.clear()  # the rejection discarded all later drafts
        if settled is not None:
            # A verdict may extend past its block over tokens drafted and sent since; its own block came first.
            asked_s = self._blocks[settled.epoch, settled.base].sent_s
            step.latency_s = settled.at_s - (asked_s if draft is None else min(asked_s, draft.sent_s))

    def _settled_by(self, first: int, tokens: list[int], source: Source) -> _Settled | None:
        """The verdict behind an output.

        Tokens of one verdict are committed together, and only the newest epoch counts.
        """

        def covers(settled: _Settled) -> bool:
            begin = first - settled.base
            return begin >= 0 and settled.source == source and settled.tokens[begin : begin + len(tokens)] == tokens

        found = [s for s in self._settled if covers(s)]
        found = [s for s in found if not s.relayed] or found
        newest = max((s.epoch for s in found), default=0)
        return next((s for s in found if s.epoch == newest), None)

    def close(self, at_s: float, missing: str = "") -> None:
        self.story.ended_s = at_s
        if missing:
            self._note(missing)
        if self.story.prompt_tokens is None:
            if self.story.session is not None:
                self._note("the beginning of its session is not in the recording, so drafts are unknown")
            return
        for step in self.story.steps:
            scored = self._scored.get(self.story.prompt_tokens + step.index)
            if scored is not None and scored.token in (step.token, step.draft):
                step.target_prob = scored.prob
                step.missed = scored.missed if scored.token == step.token else None

    def _note(self, text: str) -> None:
        if text not in self.story.notes:
            self.story.notes.append(text)
