"""What a field of a message may hold: the largest sizes, the pattern of names, and the types with their ranges."""

from typing import Annotated, Final, Literal

from msgspec import Meta

MAX_PAYLOAD_BYTES: Final = 16 * 1024 * 1024
# The cloud refuses a payload that is too large as a whole, and with it the small blocks of other agents.
MAX_BATCH_BYTES: Final = MAX_PAYLOAD_BYTES // 2
MAX_CONTEXT: Final = 131_072
MAX_BLOCK: Final = 4_096
MAX_BATCH: Final = 1_024
MAX_DOUBTS: Final = 64
MAX_TEXT: Final = 1_048_576
MAX_TOKENS: Final = 65_536
MAX_KEY: Final = 1_024
MAX_CURVES: Final = 16
MAX_PAIRS: Final = 8
MAX_NOTES: Final = 1_024
MAX_STOPS: Final = 16
MAX_GRAMMAR: Final = 16_384
MAX_REASON: Final = 1_024
MAX_PROOF: Final = 1_048_576
MAX_RIDERS: Final = 64
MAX_ROSTER: Final = 256
MAX_METRICS: Final = 512

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

# \Z, because $ would let a name end in a newline.
Name = Annotated[str, Meta(max_length=64, pattern=rf"^{NAME_PATTERN}\Z")]
Session = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Position = Annotated[int, Meta(ge=0, le=MAX_CONTEXT)]
Digest = Annotated[int, Meta(ge=0, lt=2**32)]
Drafts = Annotated[int, Meta(ge=1, le=64)]
TokenId = Annotated[int, Meta(ge=0, lt=2**24)]
TopK = Annotated[int, Meta(ge=0, lt=2**24)]
Milliseconds = Annotated[int, Meta(ge=0, lt=2**53)]
Ids = Annotated[bytes, Meta(max_length=3 * MAX_CONTEXT)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
GrammarSource = Annotated[str, Meta(max_length=MAX_GRAMMAR)]
Reason = Annotated[str, Meta(max_length=MAX_REASON)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Key = Annotated[bytes, Meta(max_length=MAX_KEY)]
Space = Annotated[str, Meta(max_length=16)]
Measure = Annotated[str, Meta(max_length=64)]
Pair = Annotated[str, Meta(max_length=16)]
Sums = Annotated[bytes, Meta(max_length=4_096)]
LogSums = Annotated[bytes, Meta(max_length=128)]

Source = Literal["local", "peer", "neighbour", "cloud", "unverified"]
Kind = Literal["state", "began", "heard", "fed", "round", "plan", "judged", "sent", "dropped", "committed", "ended"]
FinishReason = Literal["length", "stop", "error", "cancelled", "context"]
Refusal = Literal["invalid", "taken", "busy", "late"]
