"""The seam between a part and whoever asks it on its own machine: a question, and the slices of its answer.

An agent and a cloud each have an `Answerer`. `fedhlm_doors` translates the requests of public APIs into questions, and
slices into their responses.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fedhlm.decoding.grammar import Constrain, nothing_constrains
from fedhlm.protocol.fields import FinishReason, Refusal, Source
from fedhlm.receipts import Receipt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fedhlm.decoding.models import LoadedModel


class Question(NamedTuple):
    """What a local client asks. `asker` is its name in the queue, where clients take turns.

    `ids` are the prompt's, the begin-of-text id included. None means the part's own setting. The answer is held to
    `grammar`, in llguidance's Lark dialect, where there is one. `logprobs` is how many
    alternatives of each token are wanted (None: no probabilities). `context` is that of the client's span, if it has one.
    """

    asker: str
    ids: tuple[int, ...]
    max_tokens: int
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    preset: str | None = None
    grammar: str | None = None
    logprobs: int | None = None
    context: str = ""


class TokenOrigin(NamedTuple):
    """A token of an answer, and who decided it.

    `doubt` is the device's doubt u about its draft, and `draft` that draft where another token took its place; None
    where there was none. `logprob` is natural, and `top` holds (id, logprob) of the most probable tokens.
    """

    token: int
    source: Source
    doubt: float | None = None
    draft: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Drafting(NamedTuple):
    """How the drafts of one answer fared. `accepted[j]` counts the blocks of which exactly j drafts were accepted."""

    drafts: int
    accepted: tuple[int, ...] = ()


class ToolCall(NamedTuple):
    """A call of a tool in an answer. `arguments` is a JSON object, as text."""

    name: str
    arguments: str


class Slice(NamedTuple):
    """A part of an answer. The first one is empty: it says that the question waits for its turn.

    Text may come later than its tokens. A part leaves `calls` empty: they are in its text, from which
    `fedhlm_doors.tools` takes them. The last slice has a `finish` reason and the answer's figures, in the units of
    docs/protocol.md, and a `receipt` if the LLM has verified all of it. `refusal` says why a question was not served at all.
    """

    text: str = ""
    tokens: tuple[TokenOrigin, ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    refusal: Refusal | None = None
    statistics: dict[str, float] = {}  # noqa: RUF012 - never modified
    drafting: Drafting | None = None
    calls: tuple[ToolCall, ...] = ()
    receipt: Receipt | None = None


class Offer(NamedTuple):
    """What a part offers to local clients.

    `name` is the name of its model, and `presets` are what a question may name, the part's own first (empty: there is
    no choice). `folder` is the model's, and `context` is in tokens. `probabilities` says whether log-probabilities can
    be had. `constrain` says whether a grammar can be used.
    """

    name: str
    folder: Path
    tokenizer: "Tokenizer"
    bos_id: int | None
    context: int
    presets: tuple[str, ...] = ()
    probabilities: bool = False
    constrain: Constrain = nothing_constrains
    parameters: int = 0
    size_bytes: int = 0
    quantisation: str = ""
    architecture: str = ""

    @classmethod
    def of(
        cls,
        decoder: "LoadedModel",
        folder: Path,
        *,
        name: str,
        presets: tuple[str, ...] = (),
        probabilities: bool = False,
    ) -> "Offer":
        """Offer the model of a folder, which `decoder` has loaded."""
        info = decoder.info
        return cls(
            name,
            folder,
            decoder.tokenizer,
            info.bos_id,
            info.context,
            presets,
            probabilities,
            decoder.constrain,
            info.parameters,
            sum(file.bytes for file in info.files.values()),
            info.quantisation,
            info.architecture,
        )


class Answerer(Protocol):
    """Answers questions of local clients."""

    @property
    def offer(self) -> Offer:
        """What this part offers."""

    def answer(self, question: Question) -> AsyncGenerator[Slice, None]:
        """Yield the slices of the answer. Closing the generator early cancels the question."""


Door = Callable[[Answerer], AbstractAsyncContextManager[object]]
"""Lets local clients ask an answerer while the context is entered."""


def shut(_answerer: Answerer) -> AbstractAsyncContextManager[object]:
    """Let nobody in."""
    return nullcontext()
