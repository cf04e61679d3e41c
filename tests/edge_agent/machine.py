"""A generation machine, a toy SLM and a toy cloud joined by hand, so that a test decides what arrives when."""

from cloud_verifier import sessions
from cloud_verifier.sessions import Key, Sessions
from cloud_verifier.verifier import Block
from edge_agent.events import (
    Action,
    Answered,
    Commit,
    Committed,
    Drafted,
    DraftNext,
    Escalate,
    Event,
    Finish,
    Grown,
    Plan,
    Refused,
    Tick,
    Unprimed,
)
from edge_agent.gate import GATES, Settings
from edge_agent.generation import GenerationMachine
from edge_agent.growth import TreeLimits, TreeRequest
from edge_agent.model import Drawn
from edge_agent.pipeline import PIPELINES, PipelineLimits
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.tree import pack_branches
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Hints, Prime, Sampling
from fedhlm.protocol.packing import pack_ids
from fedhlm_lab.sim import toy
from tests.cloud_verifier.driven import Logits, drive

EOS = frozenset({toy.EOS_ID})


def plan(
    kind: str = "async",
    *,
    gate: str = "always",
    coupling: str = "gumbel",
    temperature: float = 0.8,
    tokens: int = 12,
    window: int = 8,
    block: int = 3,
    seed: int = 1,
    deadline_s: float = 100.0,
    context_max: int = toy.CONTEXT,
    bonus: bool = True,
) -> Plan:
    limits = PipelineLimits(window=window, block=block, flush_uncertainty=0.9, flush_age_s=0.5, bonus=bonus)
    return Plan(
        sampling=Sampling(seed, temperature, 1.0, coupling),
        gate=GATES[gate](Settings(threshold=0.6, probability=0.5, seed=seed)),
        pipeline=PIPELINES[kind](limits),
        max_tokens=tokens,
        context_max=context_max,
        eos_ids=EOS,
        deadline_s=deadline_s,
        retry_s=1.0,
        harm=COUPLINGS[coupling].harm,
    )


class Cloud:
    """Real admission and settling on a toy LLM; `lose` forgets everything, as a restart does."""

    def __init__(self, logits: Logits = toy.large_logits) -> None:
        self._logits = logits
        self.lose()

    def lose(self) -> None:
        self.sessions = Sessions(fingerprint=toy.FINGERPRINT, eos_ids=EOS, context_max=toy.CONTEXT, sessions_max=4)

    def answer(self, action: Escalate, sampling: Sampling) -> Event | None:
        before: Prime | int | None = action.digest
        if action.context is not None:
            before = Prime(sampling, toy.FINGERPRINT, pack_ids(action.context, toy.VOCAB_SIZE))
        message = Escalation(
            version=SCHEMA_VERSION,
            sender="a",
            sequence=1,
            sent_ms=0,
            session=7,
            epoch=action.epoch,
            base=action.base,
            ids=pack_ids(action.ids, toy.VOCAB_SIZE),
            patience_ms=1,
            fixed=action.fixed,
            extend=action.extend,
            before=before,
            laws=action.laws,
            hints=Hints(branches=pack_branches(action.branches, toy.VOCAB_SIZE)) if action.branches else None,
        )
        key = Key("c", "a", 7)
        admission = self.sessions.admit(key, message)
        if isinstance(admission, Block):
            entry = self.sessions.entry(key)
            assert entry is not None
            done = drive(entry.state, admission, self._logits)
            return Answered(action.epoch, action.base, done.accepted, done.ids, done.target_probs, "cloud", done.missed)
        if isinstance(admission, sessions.UnprimedBlock):
            return Unprimed(action.epoch)
        if isinstance(admission, sessions.RefusedBlock):
            return Refused(admission.reason)
        return None


class Bench:
    """The machine under test; `up` holds blocks on their way to the cloud, `down` its answers, `work` the draft."""

    def __init__(
        self,
        plan: Plan,
        prompt: list[int],
        *,
        agreement: float = 0.7,
        link_up: bool = True,
        logits: Logits = toy.large_logits,
    ) -> None:
        self.plan = plan
        self.prompt = list(prompt)
        self.machine = GenerationMachine(plan, list(prompt), link_up=link_up)
        self.drafter = toy.ToyDrafter(agreement=agreement)
        self.cloud = Cloud(logits)
        self.up: list[Escalate] = []
        self.down: list[Event] = []
        self.work: list[DraftNext] = []
        self.committed: list[Committed] = []
        self.sent: list[Escalate] = []
        self.finish: Finish | None = None
        self.now = 0.0
        self._take(self.machine.start(self.now))

    @property
    def ids(self) -> list[int]:
        return [c.token for c in self.committed]

    def _take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case DraftNext():
                    assert not self.work, "two drafts at once"
                    self.work.append(action)
                case Escalate():
                    self.up.append(action)
                    self.sent.append(action)
                case Commit(tokens):
                    assert self.finish is None
                    self.committed += tokens
                case Finish():
                    assert self.finish is None
                    self.finish = action
                case _:
                    pass

    def handle(self, event: Event) -> None:
        self._take(self.machine.handle(event, self.now))

    def draft(self) -> bool:
        """Let the SLM finish its token."""
        if not self.work:
            return False
        action = self.work.pop()
        if action.levels:
            budget = TreeLimits(nodes=12, width=4, levels=action.levels, delay_s=1.0)
            grown, _ = self.drafter.grow_now(
                TreeRequest(action.ids, self.plan.sampling, budget, settled=action.settled)
            )
            self.handle(
                Grown(action.revision, len(action.ids), [self._event(action, d) for d in grown.chain], grown.branches)
            )
        else:
            self.handle(self._event(action, self.drafter.draft_now(action.ids, self.plan.sampling)))
        return True

    def _event(self, action: DraftNext, drawn: Drawn) -> Drafted:
        return Drafted(
            action.revision, len(action.ids), drawn.token, drawn.prob, drawn.uncertainty, drawn.law, drawn.key
        )

    def settle(self, index: int = 0) -> bool:
        """Let the cloud settle the block at `index` of those on their way."""
        if not self.up:
            return False
        answer = self.cloud.answer(self.up.pop(index % len(self.up)), self.plan.sampling)
        if answer is not None:
            self.down.append(answer)
        return True

    def hear(self, index: int = 0) -> bool:
        """Let the answer at `index` of those on their way arrive."""
        if not self.down:
            return False
        self.handle(self.down.pop(index % len(self.down)))
        return True

    def run(self) -> None:
        """Let everything happen in turn until the end; time passes when nothing else can happen."""
        for _ in range(20_000):
            if self.finish is not None:
                return
            if not (self.draft() | self.settle() | self.hear()):
                wake = self.machine.wake_s()
                assert wake < float("inf"), "the machine waits for nothing"
                self.now = max(self.now, wake)
                self.handle(Tick())
        raise AssertionError("the machine does not come to an end")
