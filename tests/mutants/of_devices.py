"""Changes of what a device drafts, keeps and learns, and of how laws are coupled."""

from typing import Final

from tests.mutants.change import Change

_LEARNER = ("tests/edge_agent/test_learner.py",)
_POLICY = ("tests/edge_agent/test_policy.py",)
_GATE = ("tests/edge_agent/test_gate.py",)
_DOUBT = ("tests/fedhlm/decoding/test_uncertainty.py",)
_COUPLINGS = ("tests/fedhlm/decoding/test_couplings.py",)
_THRESHOLDS = ("tests/fedhlm/learning/test_thresholds.py",)

OF_DEVICES: Final = (
    Change(
        "peers' similarity, agent",
        "edge_agent/peers.py",
        "agrees and match.similarity >= theta",
        "agrees and match.similarity > theta",
        ("tests/edge_agent/test_peers.py",),
    ),
    Change(
        "peers' similarity for another token, agent",
        "edge_agent/peers.py",
        "match.similarity >= consensus.replace",
        "match.similarity > consensus.replace",
        ("tests/edge_agent/test_peers.py",),
    ),
    Change(
        "peers' similarity, edge",
        "edge_broker/memory.py",
        "match.similarity >= hints.similarity and",
        "match.similarity > hints.similarity and",
        ("tests/edge_broker/test_memory.py",),
    ),
    Change(
        "k-sample draws",
        "fedhlm/decoding/uncertainty.py",
        "K_SAMPLES: Final = 20",
        "K_SAMPLES: Final = 10",
        _DOUBT,
    ),
    Change(
        "closed form's temperatures",
        "fedhlm/decoding/uncertainty.py",
        "TEMPERATURE_MAX: Final = 2.0",
        "TEMPERATURE_MAX: Final = 1.0",
        _DOUBT,
    ),
    Change(
        "greedy draft's probability",
        "fedhlm/decoding/couplings.py",
        'return Draft(token, probability(scores(logits, sampling), token), b"")',
        'return Draft(token, 1.0, b"")',
        _COUPLINGS,
    ),
    Change(
        "lattice rounding",
        "fedhlm/decoding/laws.py",
        "np.floor(wanted + 0.5)",
        "np.floor(wanted)",
        ("tests/fedhlm/decoding/test_laws.py",),
    ),
    Change(
        "published-cu's draft",
        "fedhlm/decoding/couplings.py",
        "return Draft(token, prob, encode_top_k(q, order[:k]))",
        "cut = encode_top_k(q, order[:k])\n"
        "        return _draft_from(decode_top_k(cut, len(logits)), cut, sampling, position)",
        _COUPLINGS,
    ),
    Change(
        "FedProx's anchor",
        "fedhlm/learning/thresholds.py",
        "settings.mu * (tau - given.global_threshold)",
        "settings.mu * (tau - given.local)",
        _THRESHOLDS,
    ),
    Change(
        "FedProx's anchor, as it is passed",
        "edge_agent/learner.py",
        "global_threshold=local if known.published is None else known.published,",
        "global_threshold=local,",
        _LEARNER,
    ),
    Change(
        "SCAFFOLD's server control",
        "fedhlm/learning/thresholds.py",
        "gradient - given.client_control + given.server_control",
        "gradient - given.client_control",
        _THRESHOLDS,
    ),
    Change(
        "SCAFFOLD's server control, as it is passed",
        "edge_agent/learner.py",
        "server_control=known.server_control,",
        "server_control=0.0,",
        _LEARNER,
    ),
    Change(
        "paper-fl's round",
        "edge_agent/learner.py",
        "number=self.round,",
        "number=0,",
        _LEARNER,
    ),
    Change(
        "paper-fl's tokens",
        "edge_agent/learner.py",
        "if not seen.skipped and len(self._transmitted)",
        "if len(self._transmitted)",
        _LEARNER,
    ),
    Change(
        "noise of tokens in two curves",
        "edge_agent/learner.py",
        "sigma = math.sqrt(2.0) * sigma_for",
        "sigma = 1e-3 * sigma_for",
        _LEARNER,
    ),
    Change(
        "the audit's coin",
        "edge_agent/learner.py",
        "over=coin >= probability,",
        "over=True,",
        _LEARNER,
    ),
    Change(
        "the audit's probability",
        "edge_agent/learner.py",
        "over=coin >= probability,",
        "over=coin >= probability / 2.0,",
        _LEARNER,
    ),
    Change(
        "slack ignored",
        "edge_agent/policy.py",
        "config.budget * known.slack",
        "config.budget",
        _POLICY,
    ),
    Change(
        "slack's rise",
        "edge_agent/accounts.py",
        "SLACK_RISE * self.factor",
        "1e9 * self.factor",
        _POLICY,
    ),
    Change(
        "peers' share of the budget",
        "edge_agent/policy.py",
        "allowed = _allowed(known, config) - _peers_part(known, config)",
        "allowed = _allowed(known, config)",
        _POLICY,
    ),
    Change(
        "shares and counts of one's own",
        "edge_agent/policy.py",
        "return tau_of_budget(known.draft.own, ",
        "return tau_of_budget(known.draft.evidence, ",
        _POLICY,
    ),
    Change(
        "the cluster believed without limits",
        "fedhlm/learning/thresholds.py",
        "risk = np.clip(np.cumsum(shares(own) * m), *mean_limits(mine, count, 1.0 - TRUST))",
        "risk = np.cumsum(shares(own) * m) + 0.0 * mine",
        _POLICY,
    ),
    Change(
        "verification that comes back",
        "edge_agent/policy.py",
        "found.standard_error > config.budget",
        "found.standard_error > 1e9",
        _POLICY,
    ),
    Change(
        "a member near the median one",
        "fedhlm/learning/robust.py",
        "capped(contributions[n], min(weight_cap, weight_near * heads[n])",
        "capped(contributions[n], weight_cap",
        ("tests/fedhlm/learning/test_robust.py",),
    ),
    Change(
        "counts near the median one",
        "fedhlm/learning/federation.py",
        "count=int(min(update.count, most))",
        "count=update.count",
        ("tests/fedhlm/learning/test_federation.py",),
    ),
    Change(
        "harm that passed",
        "fedhlm/learning/settled.py",
        "if missing > 0.0:",
        "if missing > 1e9:",
        ("tests/fedhlm/learning/test_settled.py",),
    ),
    Change(
        "verdicts noted at the edge",
        "edge_broker/service.py",
        "            self.federation.settled.note(agent, verdict, self._pair(agent), added=added, audit=audit)\n",
        "",
        ("tests/edge_broker/test_federation.py",),
    ),
    Change(
        "the threshold's border",
        "edge_agent/gate.py",
        "uncertainty > settings.threshold",
        "uncertainty >= settings.threshold",
        _GATE,
    ),
    Change(
        "the random gate's probability",
        "edge_agent/gate.py",
        "GATE_STREAM) < settings.probability",
        "GATE_STREAM) >= settings.probability",
        _GATE,
    ),
    Change(
        "streams shared",
        "fedhlm/decoding/sampling.py",
        "AUDIT_STREAM = range(7)",
        "AUDIT_STREAM = (0, 1, 2, 3, 4, 5, 4)",
        _GATE,
    ),
    Change(
        "a stream with two users",
        "edge_agent/gate.py",
        "uniform(settings.seed, position, GATE_STREAM)",
        "uniform(settings.seed, position, 2)",
        _GATE,
    ),
)
