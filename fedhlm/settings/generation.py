"""The settings of generation: how tokens are drafted, checked and drawn, and how thresholds are learnt."""

from typing import Annotated, Literal

from msgspec import Meta

from fedhlm.protocol import fields, messages
from fedhlm.settings.section import Section, Unit, WaitMs

BlockSize = Annotated[int, Meta(ge=1, le=fields.MAX_BLOCK)]


class Pipeline(Section, frozen=True):
    """How far drafting runs ahead of the verdicts."""

    kind: Annotated[
        Literal["blocking", "async", "remote", "tree"],
        Meta(
            description="blocking waits for each verdict. async goes on drafting meanwhile. remote lets the cloud "
            "decode. tree sends alternatives with the drafts, and needs `generation.gate` always and "
            "`generation.coupling` gumbel or greedy."
        ),
    ] = "async"
    window: Annotated[
        BlockSize,
        Meta(
            description="Most tokens that async drafts ahead of the verdicts, at least `block`. Set it to the round "
            "trip divided by the time of a draft, or more."
        ),
    ] = 16
    block: Annotated[
        BlockSize,
        Meta(
            description="Drafts per block; with remote, tokens per answer. Larger saves bytes. Smaller gives "
            "earlier verdicts."
        ),
    ] = 8
    flush_uncertainty: Annotated[
        Unit, Meta(description="A draft whose doubt is above this sends its block at once. 1: no draft does.")
    ] = 1.0
    flush_age_ms: Annotated[WaitMs, Meta(description="Milliseconds after which a waiting draft sends its block.")] = (
        200.0
    )
    survival_floor: Annotated[
        Unit,
        Meta(
            description="async sends its block and pauses when the probability that all drafts in flight are "
            "accepted falls below this. Higher wastes fewer bytes and drafts. Lower keeps more tokens "
            "in flight."
        ),
    ] = 0.03
    bonus: Annotated[
        bool,
        Meta(
            description="Whether the LLM adds a bonus token after an accepted block. async always has one, and the "
            "published systems have none."
        ),
    ] = True
    drafts: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="remote: tokens that the cloud's own small model (`cloud.draft_model`) drafts before each call "
            "of the large one. The text is the same. 0: none.",
        ),
    ] = 0
    nodes: Annotated[
        int,
        Meta(
            ge=1,
            le=1_024,
            description="Most nodes of a tree. The device grows fewer where the measured delay does not repay them. "
            "Trees do not pay on short round trips.",
        ),
    ] = 64


class Consensus(Section, frozen=True):
    """When verified tokens of peers may settle a draft."""

    similarity: Annotated[
        Unit,
        Meta(
            description="Cosine from which two contexts count as near. Higher gives fewer hits, and fewer wrong ones."
        ),
    ] = 0.8
    replace: Annotated[
        float,
        Meta(
            ge=0.0,
            le=2.0,
            description="Cosine from which a different token of the neighbours replaces the draft and is verified. "
            "2: never, which is better on the shipped models.",
        ),
    ] = 2.0
    votes: Annotated[int, Meta(ge=1, le=64, description="How many of the nearest verified tokens must agree.")] = 3
    size: Annotated[int, Meta(ge=1, le=1_000_000, description="Verified tokens that a device remembers.")] = 4_096
    adapt: Annotated[
        bool,
        Meta(
            description="Under calibrated-fl (`generation.threshold`), raise `similarity` so that wrong hits stay "
            "within `error_share` of the budget. Without evidence no peer settles a token. Off: "
            "`similarity` applies from the start."
        ),
    ] = True
    error_share: Annotated[
        Unit, Meta(description="Share of `generation.budget` that wrong hits may use, if `adapt` is on.")
    ] = 0.2
    lan_price: Annotated[
        float,
        Meta(ge=0.0, le=1_000.0, description="Cost of a byte within the cluster, relative to a byte to the cloud."),
    ] = 0.1
    max_age_s: Annotated[
        float, Meta(gt=0.0, le=86_400.0, description="Seconds for which a silent agent still counts in the centroid.")
    ] = 600.0


class Learning(Section, frozen=True):
    """How the threshold is learnt, and when an agent contributes."""

    round_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000_000,
            description="Tokens after which an agent contributes. Lower learns faster and costs more bytes.",
        ),
    ] = 32
    round_s: Annotated[
        float,
        Meta(gt=0.0, le=86_400.0, description="Seconds after which an agent contributes anything new in any case."),
    ] = 60.0
    growth: Annotated[
        float,
        Meta(
            ge=0.0,
            le=100.0,
            description="Share by which an agent's number of tokens must grow before it contributes again, besides "
            "`round_tokens`. Contributions are therefore frequent at first and rare later.",
        ),
    ] = 0.1
    gamma: Annotated[float, Meta(gt=0.0, le=1_000.0, description="paper-fl: steepness gamma (FedHLM eqs 4-8).")] = 10.0
    learning_rate: Annotated[
        float, Meta(gt=0.0, le=100.0, description="paper-fl: step size, divided by 1 + `decay` times the round.")
    ] = 0.001
    decay: Annotated[float, Meta(ge=0.0, le=100.0, description="paper-fl: decay of `learning_rate` per round.")] = 0.1
    regularisation: Annotated[
        float, Meta(ge=0.0, le=100.0, description="paper-fl: weight lambda of the regulariser.")
    ] = 0.01
    optimiser: Annotated[
        Literal["fedavg", "fedprox", "scaffold", "fednova"], Meta(description="paper-fl: how thresholds are averaged.")
    ] = "fedavg"
    proximal: Annotated[
        float,
        Meta(ge=0.0, le=1_000.0, description="paper-fl: weight of the proximal term where `optimiser` is fedprox."),
    ] = 0.1
    local_steps: Annotated[int, Meta(ge=1, le=1_000, description="paper-fl: gradient steps of an agent per round.")] = 1
    objective: Annotated[
        Literal["budget", "price"],
        Meta(
            description="calibrated-fl: budget keeps as many tokens as `generation.budget` allows. price keeps a "
            "token if its harm costs less (`harm_bytes`) than sending it."
        ),
    ] = "budget"
    shrinkage: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1_000_000.0,
            description="calibrated-fl: own tokens of a bin that weigh as much as the cluster. Lower it where "
            "devices differ.",
        ),
    ] = 50.0
    forgetting: Annotated[
        Unit,
        Meta(
            description="calibrated-fl: share of the own sums that fades with each round. Raise it where texts or "
            "models change."
        ),
    ] = 0.0
    harm_bytes: Annotated[
        float,
        Meta(
            gt=0.0,
            le=1_000_000_000.0,
            description="Cost of a wrong token in bytes, for price (`objective`) and for the decision whether to "
            "ask peers.",
        ),
    ] = 1_000.0
    round_trip_bytes: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1_000_000_000.0,
            description="Cost of a round trip in bytes, for price (`objective`) and for the decision whether to ask "
            "peers.",
        ),
    ] = 100.0


class Generation(Section, frozen=True):
    """How tokens are drafted, checked and drawn."""

    coupling: Annotated[
        Literal["gumbel", "greedy", "full", "lattice", "published-cu", "published-cu-online"],
        Meta(
            description="How draft and target are coupled. Use gumbel unless you reproduce a paper. greedy always "
            "writes the likeliest token. The others send the draft law."
        ),
    ] = "gumbel"
    uncertainty: Annotated[
        Literal["closed-form", "k-sample", "entropy"],
        Meta(
            description="Form of the doubt u. k-sample is U-HLM's, with its sampling noise; entropy is FedHLM's. A "
            "curve belongs to one form, so learning starts again after a change."
        ),
    ] = "closed-form"
    gate: Annotated[
        Literal["always", "never", "random", "threshold"],
        Meta(
            description="Which drafts are verified: all, none, a share `send_probability` at random, or those whose "
            "doubt is above the threshold (`threshold`)."
        ),
    ] = "always"
    peers: Annotated[
        Literal["none", "centroid", "neighbour"],
        Meta(
            description="How peers may settle a draft: none, by the centroid of the agents, or by the nearest "
            "verified tokens. centroid and neighbour need `coupling` gumbel or greedy."
        ),
    ] = "none"
    threshold: Annotated[
        Literal["none", "fixed", "paper-fl", "calibrated-fl"],
        Meta(
            description="Where the threshold of `gate` threshold comes from: `tau` itself, FedHLM's federated "
            "steps, or a learnt curve that keeps within `budget`."
        ),
    ] = "none"
    tau: Annotated[Unit, Meta(description="Threshold on the doubt under fixed, and the start of paper-fl.")] = 0.43
    send_probability: Annotated[Unit, Meta(description="Probability of verifying a draft if `gate` is random.")] = 0.7
    budget: Annotated[
        float,
        Meta(
            gt=0.0,
            le=1.0,
            description="Mean harm per token (total variation) that kept tokens may cause. Higher keeps more tokens "
            "on the device.",
        ),
    ] = 0.05
    confidence: Annotated[
        float,
        Meta(
            ge=0.5,
            le=0.9999,
            description="Confidence of the reported limit on the harm, and of the threshold under calibrated-fl. "
            "Higher needs more evidence.",
        ),
    ] = 0.95
    audit: Annotated[
        Unit,
        Meta(
            description="Chance per token that the unverified end of a text is audited; 0, or at least 0.21. Audits "
            "travel inside other messages where they can. Higher makes the certificate tighter and "
            "costs bytes. 0: no audit, no R-hat and no certificate."
        ),
    ] = 0.0
    always_verify: Annotated[
        tuple[str, ...],
        Meta(
            description="Drafts that are verified whatever their doubt, and that the budget does not count: tool-call, "
            "number, negation, or re: and a regular expression over the text; between commas in the environment and "
            "on the command line."
        ),
    ] = ()
    consensus: Consensus = Consensus()
    learning: Learning = Learning()
    pipeline: Pipeline = Pipeline()
    temperature: Annotated[
        float,
        Meta(ge=0.0, le=10.0, description="Sampling temperature, if a prompt does not set its own. 0: greedy."),
    ] = 0.8
    top_p: Annotated[
        float,
        Meta(gt=0.0, le=1.0, description="Nucleus of the sampling, if a prompt does not set its own. 1: all tokens."),
    ] = 1.0
    top_k: Annotated[
        fields.TopK,
        Meta(description="Number of likeliest tokens to sample from, if a prompt does not set its own. 0: all tokens."),
    ] = 0
    min_p: Annotated[
        Unit,
        Meta(
            description="Least probability of a token, as a share of the likeliest one's, if a prompt does not set its "
            "own. 0: all tokens."
        ),
    ] = 0.0
    seed: Annotated[fields.Seed, Meta(description="Seed of the noise, if a prompt does not set its own.")] = 0
    max_tokens: Annotated[
        int,
        Meta(ge=1, le=fields.MAX_TOKENS, description="Most tokens of a text, if a prompt does not set its own number."),
    ] = 64
    deadline_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=3_600_000,
            description="Milliseconds that the device waits for a verdict before it commits its drafts as unverified.",
        ),
    ] = 10_000
    prompt_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=3_600_000,
            description="Milliseconds that waiting may add to `deadline_ms`, in one text, while the cloud reports that "
            "it is at work on the prompt.",
        ),
    ] = 120_000
    wait_offline: Annotated[
        bool,
        Meta(
            description="Whether to wait for `deadline_ms` also while the edge or the cloud is known to be offline. "
            "Otherwise a text that begins then is unverified at once.",
        ),
    ] = False
    retry_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=3_600_000,
            description="Milliseconds after which an unanswered block is sent again. The time doubles up to eight "
            "times this, until `deadline_ms`.",
        ),
    ] = 1_000

    def sampling(
        self,
        seed: int,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        grammar: messages.Grammar | None = None,
    ) -> messages.Sampling:
        """Return the sampling of one text. For values that are None these settings count; no text has a `grammar` by them."""
        return messages.Sampling(
            seed=seed,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p if top_p is None else top_p,
            coupling=self.coupling,
            top_k=(self.top_k if top_k is None else top_k) or None,
            min_p=(self.min_p if min_p is None else min_p) or None,
            grammar=grammar,
        )
