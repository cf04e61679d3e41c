"""The state of the console's page, from messages in order of arrival. No clock, no I/O.

Everything is bounded, because a console may run for weeks: the newest texts, events and parts are kept.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from fedhlm.errors import ProtocolError
from fedhlm.protocol.messages import (
    AnyMessage,
    Assignment,
    Evidence,
    Journal,
    Learned,
    MetricsReport,
    Output,
    Presence,
    Prompt,
    Verdict,
)
from fedhlm.protocol.roles import ROLES
from fedhlm.protocol.sources import SOURCES
from fedhlm_fleet.console.history import Cost, RoundsSeen, Routing
from fedhlm_fleet.console.texts import Pieces
from fedhlm_fleet.console.texts_seen import Place, TextsSeen
from fedhlm_fleet.status import Heard, errors_of_fleet, missing, rows

LOG_MAX: Final = 400
PARTS_MAX: Final = 4_096
FIGURES: Final = ("tau", "risk", "risk_limit")


class ConsoleState:
    """What the page shows. `changes` returns what is new since it was called last.

    `pieces` makes a decoder of one text. `budget` and `confidence` are what the certificates are compared with.
    """

    def __init__(self, pieces: Callable[[], Pieces], *, budget: float, confidence: float) -> None:
        self._texts = TextsSeen(pieces)
        self._budget, self._confidence = budget, confidence
        self._heard: OrderedDict[Place, Heard] = OrderedDict()
        self._born: OrderedDict[Place, Presence] = OrderedDict()  # the newest presence of each part that was online
        self._figures: dict[Place, dict[str, Any]] = {}
        self._clusters: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._log: deque[dict[str, Any]] = deque(maxlen=LOG_MAX)
        self._logged = 0
        self._told_log = 0
        self._routing = Routing()
        self._rounds: dict[str, RoundsSeen] = {}
        self._cost = Cost()
        self._told_routing = 0
        self._parts_changed = self._cost_changed = False
        self._clusters_changed: set[str] = set()
        self._figured: set[Place] = set()  # parts of which only figures are new
        self._now_s = 0.0

    def put(self, message: AnyMessage, levels: dict[str, str], now_s: float, *, retained: bool = False) -> None:
        """Take a message and the levels of its topic, at the Unix time `now_s`. Messages of no interest change nothing."""
        self._now_s = now_s
        match message:
            case Presence() if not ROLES[message.role].asks:
                self._presence(message, levels, retained=retained)
            case Prompt():
                self._texts.asked(levels["agent"], message, now_s)
            case Output():
                self._output(message, levels)
            case Learned():
                self._learned(message, levels.get("cluster", ""), retained=retained)
            case MetricsReport():
                self._reported(message, (levels["cluster"], levels["agent"]))
            case Journal() if levels.get("agent"):
                self._texts.noted(levels["agent"], message)
            case Verdict():
                self._texts.settled(levels["agent"], message)
            case Assignment():
                self._note("moved", "", levels.get("agent", ""), f"is assigned to cluster {message.cluster}")

    # What the page gets

    def snapshot(self) -> dict[str, Any]:
        """Everything that the page shows."""
        return {
            "budget": self._budget,
            "confidence": self._confidence,
            "sources": list(SOURCES),
            **self._parts(),
            "clusters": [self._cluster(name) for name in self._clusters],
            "routing": self._routing.since(0),
            "cost": self._cost.told(),
            "texts": self._texts.snapshot(),
            "log": list(self._log),
        }

    def changes(self) -> dict[str, Any]:
        """What is new since the last call; empty if nothing is."""
        found: dict[str, Any] = self._parts() if self._parts_changed else {}
        if self._figured and not self._parts_changed:  # most changes: figures alone, of few parts
            known = sorted(place for place in self._figured if place in self._heard)
            found["figures"] = [{"cluster": p[0], "name": p[1], **self._figures[p]} for p in known]
        if self._clusters_changed:
            found["clusters"] = [self._cluster(name) for name in sorted(self._clusters_changed)]
        if texts := self._texts.changes():
            found["texts"] = texts
            found["routing"] = self._routing.since(self._told_routing)
            self._told_routing = self._routing.newest
        if self._cost_changed:
            found["cost"] = self._cost.told()
        if self._logged > self._told_log:
            found["log"] = [entry for entry in self._log if entry["n"] > self._told_log]
        self._told_log = self._logged
        self._parts_changed = self._cost_changed = False
        self._clusters_changed, self._figured = set(), set()
        return found

    def _cluster(self, name: str) -> dict[str, Any]:
        return self._clusters[name] | {"rounds": self._rounds[name].told()}

    def _parts(self) -> dict[str, Any]:
        found = rows(self._heard.values(), now_s=self._now_s)
        parts = [
            {
                "cluster": row.cluster,
                "name": row.name,
                "role": row.role,
                "online": row.online,
                "asked": ROLES[row.role].drafts,
                "software": row.software,
                "model": row.model,
                "link": row.link,
                "wrong": row.wrong,
                "remedy": row.remedy,
                "since": None if row.since_s is None else self._now_s - row.since_s,
                **self._figures.get((row.cluster, row.name), {}),
            }
            for row in found
        ]
        return {"parts": parts, "missing": missing(found) if found else []}

    # Messages

    def _presence(self, state: Presence, levels: dict[str, str], *, retained: bool) -> None:
        place = levels.get("cluster", ""), levels.get("agent", state.role)
        before = self._heard.get(place)
        self._heard[place] = Heard(*place, state)
        while len(self._heard) > PARTS_MAX:
            self._heard.popitem(last=False)
        self._parts_changed = True
        if state.fingerprint is not None:  # a last will does not tell it
            self._figures.setdefault(place, {})["model"] = state.fingerprint.model
        was = before.presence if before is not None else None
        if state.online:
            self._arrived(place, state, was, retained=retained)
        elif was is None or was.online:
            self._note("offline", *place, "is offline")
        if ROLES[state.role].relays and state.online and was is not None and was.online:
            if state.upstream is None and was.upstream is not None:
                self._note("offline", *place, "sees no cloud: new text stays unverified")
            elif state.upstream is not None and was.upstream is None:
                self._note("online", *place, "sees the cloud again")

    def _arrived(self, place: Place, state: Presence, was: Presence | None, *, retained: bool) -> None:
        """Tell a first arrival, a connection made again, a restart, and a second program of the same name apart.

        A program makes its presence once, and numbers its messages from 1. The same one again is the same program.
        """
        born = self._born.get(place)
        self._born[place] = state
        while len(self._born) > PARTS_MAX:
            self._born.popitem(last=False)
        if born is None:
            if not retained:
                self._note("online", *place, "is online")
        elif state.sent_ms < born.sent_ms:
            self._born[place] = born
            self._note("takeover", *place, "was taken over by an earlier program of its name: two of them are running")
        elif state.sent_ms > born.sent_ms and state.sequence <= born.sequence:
            self._note("restarted", *place, "has restarted")
        elif was is not None and not was.online:
            self._note("online", *place, "is online again, and did not restart")
        if was is not None and was.online and state.fingerprint != was.fingerprint:
            self._note("online", *place, "runs another model")

    def _learned(self, learned: Learned, cluster: str, *, retained: bool) -> None:
        before = self._clusters.get(cluster)
        self._clusters[cluster] = {
            "cluster": cluster,
            "round": learned.round,
            "members": learned.members,
            "tau": {pair: t.threshold for pair, t in learned.thresholds.items()},
            "errors": self._errors(learned.evidence),
        }
        self._clusters_changed.add(cluster)
        self._rounds.setdefault(cluster, RoundsSeen()).note(learned, self._taus(cluster))
        if before is not None and before["round"] != learned.round and not retained:
            members = f"{learned.members} member{'s' if learned.members != 1 else ''}"
            self._note("round", cluster, "edge" if cluster else "cloud", f"closed round {learned.round} of {members}")

    def _taus(self, cluster: str) -> list[float]:
        """The thresholds of a cluster's agents, or with "" of all, as they told them last; 0 where nothing is kept."""
        known = ((place, figures.get("tau")) for place, figures in self._figures.items())
        return [max(0.0, tau) for (name, _), tau in known if tau is not None and cluster in ("", name)]

    def _errors(self, evidence: Evidence | None) -> list[dict[str, Any]]:
        try:
            found = errors_of_fleet(evidence, confidence=self._confidence, now_s=self._now_s)
        except ProtocolError:
            return []
        return [{"pair": e.pair, "limit": e.limit, "estimate": e.estimate, "tokens": e.tokens} for e in found]

    def _reported(self, report: MetricsReport, place: Place) -> None:
        self._note_figures(place, report.values)

    def _note_figures(self, place: Place, values: Mapping[str, float]) -> None:
        self._figures.setdefault(place, {}).update({name: values[name] for name in FIGURES if name in values})
        self._figured.add(place)

    def _output(self, output: Output, levels: dict[str, str]) -> None:
        place = levels["cluster"], levels["agent"]
        if output.refusal is not None:
            self._note("refused", *place, f"refused a request: {output.error}")
            return
        text = self._texts.put_out(place, output, self._now_s)
        if text is None:
            return
        self._count(place, output)
        if output.finish is not None:
            self._finish(place, text, output)

    def _count(self, place: Place, output: Output) -> None:
        counts = self._figures.setdefault(place, {}).setdefault("sources", dict.fromkeys(SOURCES, 0))
        for source in output.sources:
            counts[source] += 1
        self._routing.count(output.sources, self._now_s)
        self._figured.add(place)

    def _finish(self, place: Place, text: dict[str, Any], output: Output) -> None:
        self._note_figures(place, text["statistics"])
        heard = self._heard.get(place)
        model = heard.presence.fingerprint if heard is not None else None
        written = "".join(str(token[0]) for token in text["tokens"])
        self._cost.add(text["count"], written, text["statistics"], 0 if model is None else model.vocab_size)
        self._cost_changed = True
        if output.finish in ("error", "cancelled"):
            self._note("refused", *place, f"ended a text: {output.finish}, {output.error}")

    def _note(self, kind: str, cluster: str, who: str, words: str) -> None:
        self._logged += 1
        self._log.append(
            {"n": self._logged, "at": self._now_s, "kind": kind, "cluster": cluster, "who": who, "words": words}
        )
