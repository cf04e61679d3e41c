"""The newest texts of a fleet, token by token: who decided each, and what is known of it. No clock, no I/O."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from edge_agent.events import Judged
from fedhlm.protocol.messages import Journal, Output, Prompt, Verdict
from fedhlm.protocol.sources import SOURCES
from fedhlm_fleet.console.later import LaterVerdicts
from fedhlm_fleet.console.texts import Pieces
from fedhlm_traces.journal_reader import JournalReader

TEXTS_MAX: Final = 40
TOKENS_MAX: Final = 2_048  # of one text that are shown
PROMPTS_MAX: Final = 1_024
SHOWN: Final = 600  # characters of a prompt
# What stands where in the list of a token, after its text and its source. For "missing" tokens DOUBT holds their number.
DOUBT, DRAFT, SCORE, LATER, MS = 2, 3, 4, 5, 6

Place = tuple[str, str]  # cluster and name; the cloud's cluster is empty
Key = tuple[str, str]  # agent and request


class SeenPrompt(NamedTuple):
    """A prompt as it was seen: its text, cut, who sent it, and when."""

    text: str
    client: str
    at_s: float


def token(text: str, source: str, ms: float, *, missing: int | None = None) -> list[Any]:
    """A token: text, source, doubt, the device's draft, the peers' score, whether the LLM agreed later, milliseconds.

    What is not known, or not yet, is None. The milliseconds are those since the prompt, as the console saw it come.
    """
    return [text, source, missing, None, None, None, round(ms)]


class TextsSeen:
    """The newest texts. `changes` returns what is new since it was called last; `pieces` makes a decoder of one text."""

    def __init__(self, pieces: Callable[[], Pieces]) -> None:
        self._pieces = pieces
        self._prompts: OrderedDict[Key, SeenPrompt] = OrderedDict()
        self._texts: OrderedDict[Key, dict[str, Any]] = OrderedDict()
        self._decoders: dict[Key, Pieces] = {}
        self._journals: dict[str, JournalReader] = {}
        self._later = LaterVerdicts()
        self._sessions: OrderedDict[tuple[str, int], tuple[Key, int]] = (
            OrderedDict()
        )  # their text, tokens of its prompt
        self._from: dict[Key, int] = {}  # the first token of each text that is new

    def snapshot(self) -> list[dict[str, Any]]:
        """All texts, oldest first."""
        return [text | {"from": 0} for text in self._texts.values()]

    def changes(self) -> list[dict[str, Any]]:
        """The texts of which something is new, each with its tokens from `from` on."""
        found = [
            self._texts[key] | {"from": start, "tokens": self._texts[key]["tokens"][start:]}
            for key, start in self._from.items()
            if key in self._texts
        ]
        self._from = {}
        return found

    def asked(self, agent: str, prompt: Prompt, now_s: float) -> None:
        """Take a prompt."""
        self._prompts[agent, prompt.request] = SeenPrompt(prompt.text[:SHOWN], prompt.sender, now_s)
        while len(self._prompts) > PROMPTS_MAX:
            self._prompts.popitem(last=False)

    def put_out(self, place: Place, output: Output, now_s: float) -> dict[str, Any] | None:
        """Take committed tokens. Return their text; None for a duplicate, or what came late."""
        key = place[1], output.request
        text = self._texts.get(key)
        if text is None or (text["finish"] is not None and output.position == 0 and output.ids):
            text = self._begin(key, place, output, now_s)
        if text["finish"] is not None or output.position < text["count"]:
            return None
        ms = 1000.0 * (now_s - text["at"])
        self._from.setdefault(key, len(text["tokens"]))
        if output.position > text["count"]:
            text["tokens"].append(token(" … ", "missing", ms, missing=output.position - text["count"]))
        told = self._decoders[key].by_source(output.ids, output.text, output.sources)
        if len(text["tokens"]) < TOKENS_MAX:
            text["tokens"] += [token(shown, source, ms) for shown, source in told]
        text["count"] = output.position + len(output.ids)
        if output.finish is not None:
            text["finish"], text["error"] = output.finish, output.error
            text["statistics"] = {name: value for name, value in output.statistics.items() if abs(value) < 1e15}
            self._decoders.pop(key, None)
        return text

    def _begin(self, key: Key, place: Place, output: Output, now_s: float) -> dict[str, Any]:
        asked = self._prompts.pop(key, SeenPrompt("", output.client or "", now_s))
        self._texts[key] = text = {
            "id": f"{key[0]}/{key[1]}",
            "agent": key[0],
            "cluster": place[0],
            "client": asked.client,
            "prompt": asked.text,
            "at": asked.at_s,
            "tokens": [],
            "count": 0,
            "finish": None,
            "error": "",
            "statistics": {},
        }
        self._decoders[key] = self._pieces()
        while len(self._texts) > TEXTS_MAX:
            eldest, _ = self._texts.popitem(last=False)
            self._decoders.pop(eldest, None)
            self._from.pop(eldest, None)
        return text

    def noted(self, agent: str, journal: Journal) -> None:
        """Add doubts and replaced drafts to finished texts of an agent that publishes its journal."""
        for told in self._journals.setdefault(agent, JournalReader()).read(journal):
            key = agent, told.request
            text = self._texts.get(key)
            if text is None or len(text["tokens"]) != text["count"]:
                continue
            for place, judged in told.drafts.items():
                if place < text["count"]:
                    self._judged(text["tokens"][place], judged)
            self._sessions[agent, told.session] = key, told.prompt_tokens
            while len(self._sessions) > TEXTS_MAX:
                self._sessions.popitem(last=False)
            self._from[key] = 0
            self._verified_later(agent, told.session)

    def settled(self, agent: str, verdict: Verdict) -> None:
        """Take a verdict for an agent: the LLM may have looked at tokens that were committed without it."""
        self._later.hear(agent, verdict)
        self._verified_later(agent, verdict.session)

    def _verified_later(self, agent: str, session: int) -> None:
        key, before = self._sessions.get((agent, session), (None, 0))
        text = self._texts.get(key) if key is not None else None
        if key is None or text is None:
            return
        for position, same in self._later.of(agent, session).items():
            place = position - before
            if not 0 <= place < len(text["tokens"]):
                continue
            shown = text["tokens"][place]
            traits = SOURCES.get(shown[1])
            if traits is not None and not traits.verified and shown[LATER] is not same:
                shown[LATER] = same
                self._from[key] = min(place, self._from.get(key, place))

    def _judged(self, shown: list[Any], judged: Judged) -> None:
        shown[DOUBT] = round(judged.uncertainty, 4)
        shown[SCORE] = None if judged.score is None else round(judged.score, 3)
        if judged.own != judged.token or judged.escalate:
            shown[DRAFT] = self._pieces().alone(judged.own)
