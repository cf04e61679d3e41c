"""The unit and the meaning of every field of every message, for docs/protocol.md and docs/asyncapi.json."""

from typing import Final

_SESSION: Final = ("", "number of the generation, chosen by the agent and not used again soon")
_EPOCH: Final = ("", "how many times this generation was rolled back before the block was drafted")
_BASE: Final = ("tokens", "length of the context before the block, prompt included")
_SPACE: Final = ("", "digest of projection and tokenizer; keys of other spaces cannot be compared with these")
_KEY: Final = ("", "context key: int8 values, a vector whose cosine tells how similar two contexts are")
_ROUND: Final = ("", "number of the federated round")
_MEMBERS: Final = ("agents", "how many agents are behind the message")
_EVIDENCE: Final = ("", "what is known of the error per token, of the member or of the whole fleet")
_PAPER: Final = ("", "by pair of models, under the threshold rule `paper-fl` only")
_CURVES: Final = ("", "by measure: a bitmap of the non-empty bins (8 bytes), then 4 little-endian float32 for each")

# By the name of the struct and of the field: the unit ("" for none) and the meaning.
MEANINGS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Message": {
        "version": ("", "schema version; a receiver drops a message of any other version"),
        "sender": ("", "name of the party that sends"),
        "sequence": ("", "running number of the sender's messages, modulo 2^31"),
        "sent_ms": ("ms", "Unix time of the sending by the sender's clock; for information"),
    },
    "Fingerprint": {
        "tokenizer": ("", "digest of the tokenizer"),
        "vocab_size": ("tokens", "size of the vocabulary; it sets the width of packed ids"),
        "noise": ("", "version of the shared noise"),
        "model": ("", "name of the model, for information"),
    },
    "Sampling": {
        "seed": ("", "seed of the shared noise"),
        "temperature": ("", "divides the logits; 0 is greedy"),
        "top_p": ("", "keep the likeliest tokens up to this total probability"),
        "coupling": ("", "rule by which drafts are accepted or rejected"),
        "top_k": ("tokens", "keep this many of the likeliest tokens; nil keeps all"),
        "min_p": ("", "keep tokens of at least this share of the likeliest one's probability; nil keeps all"),
        "grammar": ("", "the grammar that the text is held to; nil for none"),
    },
    "Grammar": {
        "start": ("tokens", "position at which the text begins: the length of the prompt"),
        "source": ("characters", "the grammar, in llguidance's Lark dialect"),
    },
    "Presence": {
        "role": ("", "what kind of part it is"),
        "online": ("", "whether the part is there; its last will says false"),
        "software": ("", "version of the software"),
        "fingerprint": ("", "the part's own model; nil for an edge, which has none"),
        "upstream": ("", "an edge says here which cloud it sees; nil for none"),
        "connection": ("", "which of several connections of a client this is; nil for a client with one"),
    },
    "Prompt": {
        "request": ("", "name of the request, new for this agent"),
        "text": ("characters", "the text to continue, as Unicode"),
        "max_tokens": ("tokens", "most tokens of the answer"),
        "seed": ("", "the same seed gives the same text under `exact`; nil lets the agent choose"),
        "temperature": ("", "nil means the agent's own"),
        "top_p": ("", "nil means the agent's own"),
        "stop": ("", "texts before the first of which the answer ends"),
        "preset": ("", "name of a preset; nil means the agent's own"),
        "patience_ms": ("ms", "span after its arrival at the agent at which the request is given up; nil for never"),
        "top_k": ("tokens", "0 keeps all tokens; nil means the agent's own"),
        "min_p": ("", "0 keeps all tokens; nil means the agent's own"),
        "connection": ("", "as in the client's presence, whose end ends the request"),
        "grammar": ("characters", "the grammar that the answer is held to, in llguidance's Lark dialect; nil for none"),
        "receipt": ("", "whether the last output is to have a proof"),
    },
    "Output": {
        "request": ("", "the request's name, as in the prompt"),
        "position": ("tokens", "number of the answer's tokens before this output; a gap means a lost output"),
        "ids": ("", "the new tokens"),
        "sources": ("", "who settled each of `ids`; `unverified` means nobody: no verdict came in time"),
        "text": ("", "what this adds to the text; it may come later than its ids, when a character is incomplete"),
        "finish": ("", "why the answer ended; nil before its last output"),
        "error": ("", "reason for the finish `error` or `cancelled`"),
        "statistics": ("", "figures of the whole answer, in the last output: see below"),
        "client": ("", "sender of the prompt"),
        "refusal": ("", "set if the request was not served: invalid value, name taken, agent busy, or too late"),
        "proof": (
            "characters",
            "receipt and prompt's ids in JSON, for a prompt with `receipt`; nil if the LLM has not verified all",
        ),
    },
    "Prime": {
        "sampling": ("", "sampling parameters of the generation"),
        "fingerprint": ("", "what agent and cloud must share"),
        "context": ("", "packed ids of the `base` tokens before the block"),
    },
    "Rider": {
        "session": _SESSION,
        "epoch": _EPOCH,
        "base": _BASE,
        "ids": ("", "packed ids of committed tokens that are to be scored"),
        "fixed": ("tokens", "how many of `ids` are committed, which is all of them"),
        "before": ("", "as in Escalation"),
    },
    "Hints": {
        "similarity": ("", "cosine from which on a verified token may settle a draft; nil forbids it"),
        "votes": ("", "how many verified tokens must agree for that"),
        "branches": ("", "tree draft: packed ids of all branches, then the parent of each as a little-endian uint16"),
        "riders": ("", "audits of other sessions, which travel along"),
    },
    "Escalation": {
        "session": _SESSION,
        "epoch": _EPOCH,
        "base": _BASE,
        "ids": ("", "packed ids of the block"),
        "patience_ms": ("ms", "span after the sending at which nobody waits for the verdict any more"),
        "fixed": ("tokens", "how many of `ids` are committed already: they are scored and never replaced"),
        "extend": ("tokens", "how many tokens of the cloud's own are wanted after a wholly accepted block"),
        "before": (
            "",
            "prime in the first block of a session, else CRC-32 of the `base` ids (4 little-endian bytes each)",
        ),
        "laws": ("", "draft laws one after the other, for couplings that need them"),
        "hints": ("", "optional parts, or how many tokens the cloud's own small model is to draft; nil for none"),
    },
    "Verdict": {
        "session": _SESSION,
        "epoch": _EPOCH,
        "base": _BASE,
        "status": (
            "",
            "`unprimed` asks for a prime, `refused` gives a reason, `working` says that the answer is to come",
        ),
        "accepted": ("tokens", "number of accepted ids, fixed ones included"),
        "ids": ("", "packed ids that follow: one in place of a rejected draft, or those of the cloud's own"),
        "target_probs": ("", "target probability of each scored id, little-endian float16"),
        "source": ("", "who settled the block"),
        "reason": ("", "reason for the status `refused`; with `settled`, why tokens may not be the LLM's own"),
        "missed": ("", "one bit for each fixed id, lowest first: the target would have emitted another token"),
        "fed": ("tokens", "how many ids of the prime the cloud has read, with the status `working`"),
    },
    "RoutedEscalation": {
        "agent": ("", "who sent the block"),
        "escalation": ("", "the whole message, with its tag"),
    },
    "RoutedVerdict": {
        "agent": ("", "who the verdict is for"),
        "verdict": ("", "the whole message, with its tag"),
    },
    "EscalationBatch": {"items": ("", "blocks of several agents")},
    "VerdictBatch": {"items": ("", "verdicts for several agents")},
    "Uncertain": {
        "position": ("tokens", "where in the context the draft stands"),
        "token": ("", "id of the draft"),
        "uncertainty": ("", "doubt u of the draft"),
        "key": _KEY,
    },
    "UncertainTokens": {
        "session": _SESSION,
        "space": _SPACE,
        "items": ("", "the drafts"),
    },
    "Verified": {
        "key": _KEY,
        "token": ("", "id of the token that the cloud settled"),
    },
    "VerifiedTokens": {
        "space": _SPACE,
        "items": ("", "the tokens"),
    },
    "PaperThreshold": {
        "threshold": ("", "threshold on the doubt"),
        "count": ("tokens", "how many tokens it was learnt from"),
        "control": ("", "control variate: a mean gradient"),
        "steps": ("", "number of local gradient steps"),
    },
    "Evidence": {
        "began_ms": ("ms", "Unix time at which the evidence began; another one begins where a device lost its state"),
        "sums": (
            "",
            "by pair of models, of everything since then, as 9 little-endian float64: tokens, texts, harm, 6 log-sums",
        ),
    },
    "Contribution": {
        "round": _ROUND,
        "members": _MEMBERS,
        "thresholds": _PAPER,
        "curves": _CURVES,
        "evidence": _EVIDENCE,
    },
    "Learned": {
        "round": _ROUND,
        "members": _MEMBERS,
        "refused": ("", "how many contributions of the round were rejected"),
        "thresholds": _PAPER,
        "curves": _CURVES,
        "evidence": _EVIDENCE,
    },
    "Profile": {
        "agent": ("", "whose tokens these are"),
        "dims": ("", "number of int8 values of each key"),
        "keys": ("", "the keys, one after the other"),
        "uncertainties": ("", "doubt of each token, as uint8 in 1/255"),
    },
    "Assignment": {"cluster": ("", "where the agent belongs from now on")},
    "Note": {
        "at_s": ("s", "monotonic time by the part's clock"),
        "kind": ("", "what the note is about: `state`, `heard` and the like are inputs, the others decisions"),
        "subject": ("", "name of a topic, or what `data` holds"),
        "data": ("", "the content, which is the software's own"),
    },
    "Journal": {
        "life": ("", "number of this run of the part"),
        "number": ("", "number of the first of `notes`; a gap means lost notes"),
        "notes": ("", "consecutive notes"),
    },
    "Cancel": {"request": ("", "name of the request of the same sender")},
    "Forget": {"order": ("", "random number of the order; a part obeys an order once")},
    "MemberSums": {
        "name": ("", "an agent, or a cluster at the cloud"),
        "agents": ("agents", "how many agents are behind the member"),
        "seen": ("decisions", "decisions of the gate"),
        "weight": ("tokens", "tokens that the target scored"),
        "harm": ("tokens", "sum of the harm of these tokens"),
        "silent_s": ("s", "time since its latest contribution"),
        "blamed": ("", "by reason: contributions that were rejected, or cut"),
    },
    "Roster": {
        "members": ("", "members with the largest weight"),
        "left_out": ("", "number of further members"),
        "obeyed": ("", "orders to forget a member that were obeyed last"),
    },
    "MetricsReport": {"values": ("", "value by name, or by `name.label`; see the table of metrics")},
}
