"""The plan of a generation, and verdicts as events for its machine."""

from edge_agent import policy
from edge_agent.events import Answered, Event, Plan, Refused, Unprimed, Working
from edge_agent.gate import GATES, Settings
from edge_agent.learner import Learner
from edge_agent.measures import measures_of
from edge_agent.peers import Peers
from edge_agent.pipeline import PIPELINES, PipelineLimits
from edge_agent.result import Job
from fedhlm import choices
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.protocol.messages import Verdict
from fedhlm.protocol.packing import unpack_bits, unpack_ids, unpack_probs


def plan_of(job: Job, learner: Learner, peers: Peers) -> Plan:
    """Create the plan of a job with the current thresholds. The settings' types have checked all names."""
    config, sampling = job.config, job.sampling
    measures = measures_of(config, sampling, learner.pair)
    pipeline = config.pipeline
    limits = PipelineLimits(
        window=pipeline.window,
        block=pipeline.block,
        flush_uncertainty=pipeline.flush_uncertainty,
        flush_age_s=pipeline.flush_age_ms / 1000.0,
        survival_floor=pipeline.survival_floor,
        bonus=pipeline.bonus,
        drafts=pipeline.drafts,
    )
    known = learner.knowledge(measures, config)
    tau, similarity = policy.tau(known, config), policy.similarity(known, config)
    coupling = COUPLINGS[sampling.coupling]
    return Plan(
        sampling=sampling,
        gate=GATES[config.gate](Settings(tau, config.send_probability, sampling.seed)),
        pipeline=PIPELINES[pipeline.kind](limits),
        max_tokens=job.max_tokens,
        context_max=job.context_max,
        eos_ids=job.eos_ids,
        deadline_s=config.deadline_ms / 1000.0,
        retry_s=config.retry_ms / 1000.0,
        harm=coupling.harm,
        consult=peers.consult(config, similarity),
        similarity=None if choices.GATES[config.gate].verifies_all else similarity,
        votes=config.consensus.votes,
        tau=tau,
        prompt_s=config.prompt_ms / 1000.0,
    )


def event_of(verdict: Verdict, vocab_size: int) -> Event:
    """Decode a verdict.

    Raises:
        ProtocolError: ids or probabilities that no target with this vocabulary can have sent.
    """
    match verdict.status:
        case "settled":
            ids = unpack_ids(verdict.ids, vocab_size)
            probs = [float(p) for p in unpack_probs(verdict.target_probs)]
            missed = unpack_bits(verdict.missed, len(probs))
            return Answered(verdict.epoch, verdict.base, verdict.accepted, ids, probs, verdict.source, missed)
        case "unprimed":
            return Unprimed(verdict.epoch)
        case "working":
            return Working(verdict.epoch, verdict.fed)
        case "refused":
            return Refused(verdict.reason)
