"""Run devices on recorded texts (`recorded`): the agents' own machine and learner, without models, bus and clock.

A kept wrong token does not change the doubts after it, because the recording follows the LLM's text. Everything else
is what a device does: its blocks, its audits, its threshold, and what its cluster tells it. Seconds instead of minutes.

Run: python -m fedhlm_lab.studies.offline --recording FILE [--kind topic] [--prompts 1000] [--warm 3000]
[--set KEY=VALUE]
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from edge_agent.accounts import OpenText
from edge_agent.coins import audit_coin
from edge_agent.events import Answered, Drafted, Escalate, Finish, Plan
from edge_agent.generation import GenerationMachine, scored
from edge_agent.learner import Learner
from edge_agent.measures import measures_of
from edge_agent.peers import Peers
from edge_agent.planning import plan_of
from edge_agent.result import Job
from fedhlm.config import load
from fedhlm.decoding.decoder import Decoder
from fedhlm.decoding.important import important_of
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.curve import Curve
from fedhlm.progress import progress
from fedhlm.protocol.messages import SCHEMA_VERSION, Learned, Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Generation
from fedhlm_lab.studies.command_line import COUNT, TEMPERATURE, Parser, limited, out_file, settings_of
from fedhlm_lab.studies.command_line import run as run_study
from fedhlm_lab.studies.compare import AGENTS, CLUSTERS, Oracle, shuffled_test_split, tasks_of
from fedhlm_lab.studies.driving import drive
from fedhlm_lab.studies.recorded import RecordedText, load_or_record
from fedhlm_zoo.shipped import model_folder

CONTEXT_MAX: Final = 1 << 20


class TextFigures(NamedTuple):
    """The outcome of one text.

    Attributes:
        tokens: committed tokens.
        kept: tokens that the device settled.
        wrong: kept tokens that the LLM would have written otherwise.
        blocks: messages to the cloud, without those of audits.
        audited: tokens that an audit scored.
        tau: the threshold.
        right: for a topic question, whether the answer is right; otherwise 0.
    """

    tokens: int
    kept: int
    wrong: int
    blocks: int
    audited: int
    tau: float
    right: bool


class OfflineDevice:
    """One device with its learner. `read` returns the text of ids, for the rules of `always_verify`."""

    def __init__(
        self,
        learner: Learner,
        config: Generation,
        temperature: float,
        read: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self._important = important_of(config.always_verify, read)
        self.learner = learner
        self.config = config
        self._temperature = temperature
        self._peers = Peers("device", lambda: 0.0, size=1, max_age_s=1.0)
        self.measures = measures_of(config, Sampling(0, temperature, 1.0, config.coupling), learner.pair)

    def write(self, text: RecordedText, seed: int) -> TextFigures:
        """Generate one text, audit it at once if the coin says so, and learn from it."""
        sampling = Sampling(seed, self._temperature, 1.0, self.config.coupling)
        job = Job(self.config, sampling, len(text.target), CONTEXT_MAX, frozenset())
        plan = plan_of(job, self.learner, self._peers)
        machine = GenerationMachine(plan, [0] * text.prompt)
        done = drive(
            machine,
            lambda wanted: self._drafted(text, wanted.revision, len(wanted.ids)),
            lambda block: _answer(text, block),
        )
        seen, end, blocks = done.observed, done.end, done.blocks
        sources = [token.source for token in done.tokens]
        escalated = machine.tally.escalated
        self.learner.observe(self.measures, self.config, seen)
        tail = end.tail.tokens
        open_text = self.learner.finished(
            self.measures,
            self.config,
            seen,
            tail,
            tokens=len(sources),
            tau=plan.tau,
            escalation_bytes=0,
            escalated=escalated,
            coin=audit_coin(seed),
        )
        if open_text is not None:
            self._audit(text, plan, end, open_text)
        kept = np.array([not SOURCES[source].verified for source in sources], bool)  # (n,)
        right = text.right is not None and text.right[int(kept[0])]
        wrong = int(text.harms[: kept.size][kept].sum())
        audited = 0 if open_text is None else len(tail)
        return TextFigures(kept.size, int(kept.sum()), wrong, blocks, audited, plan.tau, right)

    def _drafted(self, text: RecordedText, revision: int, position: int) -> Drafted:
        place = position - text.prompt
        rule = self._important(text.target[:place], text.drafts[place])
        return Drafted(revision, position, text.drafts[place], 1.0, text.doubts[place], rule=rule)

    def _audit(self, text: RecordedText, plan: Plan, end: Finish, open_text: OpenText) -> None:
        tail = end.tail
        place = len(tail.context) - text.prompt
        missed = text.harms[place : place + len(tail.tokens)] > 0.0
        answer = Answered(tail.epoch, len(tail.context), len(missed), [], [0.0] * len(missed), "cloud", missed.tolist())
        scores = [
            scored(plan.harm, token, answer, offset, skipped=True, audit=True)
            for offset, token in enumerate(tail.tokens)
        ]
        self.learner.observe(self.measures, self.config, scores)
        self.learner.audited(open_text, [s.committed_harm for s in scores])


def _answer(text: RecordedText, block: Escalate) -> Answered:
    start = block.base - text.prompt
    target = text.target[start : start + len(block.ids)]
    missed = [token != other for token, other in zip(block.ids, target, strict=True)]
    accepted = next((i for i in range(block.fixed, len(missed)) if missed[i]), len(missed))
    looked = min(accepted + 1, len(missed))
    follow = text.target[start + accepted :][: 1 if accepted < len(missed) else block.extend]
    return Answered(block.epoch, block.base, accepted, follow, [0.0] * looked, "cloud", missed[: block.fixed])


def run(
    texts: Sequence[RecordedText],
    config: Generation,
    temperature: float,
    *,
    learners: Sequence[Learner],
    read: Callable[[Sequence[int]], str] | None = None,
    ended: Callable[[], object] = lambda: None,
) -> tuple[list[TextFigures], Certificate]:
    """Run a fleet: text i is of device i modulo their number. Its curves are summed whenever one has a round due.

    `ended` is called for each text.
    """
    devices = [OfflineDevice(learner, config, temperature, read) for learner in learners]
    shared: dict[int, dict[str, bytes]] = {}
    rows = []
    for number, text in enumerate(texts):
        ended()
        place = number % len(devices)
        device = devices[place]
        rows.append(device.write(text, number))
        if device.learner.due(config, 0.0):
            given = device.learner.contribution(config, 0.0)
            if given is not None:
                shared[place] = given[1]
                state = _sum(shared.values())
                for one in devices:
                    one.learner.learned(state)
    known = [device.learner.certificate(device.measures, config) for device in devices]
    return rows, sum((c for c in known if c is not None), Certificate())


def _sum(shares: Iterable[Mapping[str, bytes]]) -> Learned:
    total: dict[str, Curve] = {}
    for share in shares:
        for name, data in share.items():
            total[name] = total.get(name, Curve.empty()) + Curve.from_bytes(data)
    return Learned(
        SCHEMA_VERSION, "cloud", 0, 0, round=1, members=len(total), curves={n: c.to_bytes() for n, c in total.items()}
    )


def show(
    rows: Sequence[TextFigures], texts: Sequence[RecordedText], certificate: Certificate, confidence: float
) -> str:
    """One line: messages, kept tokens, harm and audits a token, and what the certificate says."""
    tokens = sum(row.tokens for row in rows)
    sums = {name: sum(getattr(row, name) for row in rows) / tokens for name in ("blocks", "kept", "wrong")}
    audits = sum(row.audited > 0 for row in rows) / tokens
    better = ""
    if texts[0].right is not None:
        right = np.mean([row.right for row in rows]) - np.mean([text.right[0] for text in texts if text.right])
        better = f", answers {100.0 * right:+.1f} points"
    return (
        f"sent {sums['blocks']:.4f}, kept {sums['kept']:.4f}, harm {sums['wrong']:.4f}{better}, audits {audits:.4f}, "
        f"tau {rows[0].tau:.3f} to {rows[-1].tau:.3f}, R-hat {certificate.estimate:.4f} "
        f"({certificate.limit(confidence):.4f})"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(
        prog="python -m fedhlm_lab.studies.offline", description="the preset budget on recorded AG News texts"
    )
    parser.add_argument(
        "--recording", type=out_file, required=True, help="file of the recorded texts; written if absent"
    )
    parser.add_argument("--kind", default="topic", choices=["topic", "continue"])
    parser.add_argument("--prompts", type=COUNT, default=1_000)
    parser.add_argument(
        "--warm",
        type=limited(int, 0, 1_000_000),
        default=3_000,
        help="so many items go before, to learn from; not counted",
    )
    parser.add_argument("--tokens", type=COUNT, default=32)
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the preset")
    options = parser.parse_args(arguments)
    flags = {"generation.peers": "none"} | settings_of(options.set)
    config = load(preset="budget", environ={}, flags=flags).config
    large = Oracle(model_folder("", "llm"))
    articles = shuffled_test_split()[: options.warm + options.prompts]
    tasks = tasks_of(articles, options.kind, large.decoder, tokens=options.tokens, temperature=options.temperature)
    small = Decoder.load(model_folder("", "slm"), threads=1)
    with progress("texts recorded", len(tasks)) as ended:
        texts = load_or_record(options.recording, tasks, large, small, config.generation.coupling, ended)
    learners = [Learner(config.federation, np.random.default_rng(place)) for place in range(CLUSTERS * AGENTS)]
    with progress("texts", len(texts)) as ended:
        rows, certificate = run(
            texts, config.generation, options.temperature, learners=learners, read=small.tokenizer.decode, ended=ended
        )
    print(show(rows[options.warm :], texts[options.warm :], certificate, config.generation.confidence))
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "python -m fedhlm_lab.studies.offline"))
