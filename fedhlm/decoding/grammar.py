"""Texts that are held to a grammar: at each position, only tokens that can continue a text of the grammar are possible.

Both models' logits are masked before temperature, filters and noise. The target law is the LLM's law under the mask, and
every coupling keeps its promise with respect to that law: the text of `exact` is the text that the LLM alone writes
under the same grammar. A mask is a function of the generated ids alone, so the two ends need not agree on a state.

Grammars are written in the Lark dialect of llguidance, in which ``%json {...}`` stands for a JSON schema.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.ids import common_prefix
from fedhlm.errors import GrammarError
from fedhlm.protocol.messages import Grammar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXTRA: Final = "serve"  # the extra that brings llguidance to a device
FORBIDDEN: Final = -1e30  # the logit of an impossible token; finite, as 0 times infinity is not a number
_ONE_LINE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SLASH: Final = re.compile(r"\\.|/|\n", re.DOTALL)  # an escaped character is left as it is
COMPILED_MAX: Final = 32  # grammars; a small schema takes about 54 KB
STRIDE: Final = 64  # ids from one state that is kept to the next
POSSIBLE: Final = -1e28  # every possible token is above, after division by any temperature


def json_rule(schema: Mapping[str, Any]) -> str:
    """An expression of a grammar: the JSON values that a JSON schema allows, on one line with one space between items.

    White space elsewhere would be allowed by JSON, but a small model may never come back from it.
    """
    return f"%json {json.dumps({'x-guidance': _ONE_LINE} | dict(schema))}"


def of_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON values that a JSON schema allows, written as `json_rule` says."""
    return f"start: {json_rule(schema)}"


def of_regex(pattern: str) -> str:
    """The grammar of the texts that a regular expression of Rust's regex crate matches from end to end."""
    return f"start: /{_SLASH.sub(_quoted, pattern)}/"


def of_choice(texts: Iterable[str]) -> str:
    """The grammar of these texts."""
    return f"start: {' | '.join(json.dumps(text) for text in texts)}"


def _quoted(found: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n"}.get(found[0], found[0])


class Constraint:
    """A text that is held to a grammar. What it returns depends on its arguments only, so copies may share it.

    A matcher reads a text forwards. To go back, a copy of an earlier state reads on: after `rollback` and `reset`,
    matchers of llguidance 1.9 were seen to allow other tokens than new ones.
    """

    def __init__(self, matcher: Any, start: int, only_end: NDArray[np.bool_]) -> None:
        """`matcher` reads the ids from position `start` on. `only_end`, shape (V,), allows the end of text alone."""
        self._start = start
        self._only_end = only_end
        self._taken: list[int] = []  # the generated ids that the matcher has read
        self._states = [matcher]  # after every multiple of STRIDE ids
        self._matcher = matcher.deep_copy()

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Constraint":
        return self

    def masked(self, logits: NDArray[Any], ids: Sequence[int]) -> NDArray[Any]:
        """The logits of the token after `ids` (prompt included), shape (V,), with FORBIDDEN for impossible tokens.

        After a complete text only the end of text is possible. Where the ids have left the grammar already, which only
        ids that were never masked can do, everything is.
        """
        allowed = self._allowed(list(ids[self._start :]))
        return logits if allowed is None else np.where(allowed, logits, np.float32(FORBIDDEN))

    def _allowed(self, text: list[int]) -> NDArray[np.bool_] | None:
        shared = common_prefix(self._taken, text)
        if shared < len(self._taken):
            del self._states[shared // STRIDE + 1 :]
            del self._taken[(len(self._states) - 1) * STRIDE :]
            self._matcher = self._states[-1].deep_copy()
        for token in text[len(self._taken) :]:
            if not self._matcher.try_consume_tokens([token]):
                # A matcher whose limits the text has outgrown can promise nothing more, so the text ends there.
                return self._only_end if self._matcher.is_error() else None
            self._taken.append(token)
            if len(self._taken) % STRIDE == 0:
                self._states.append(self._matcher.deep_copy())
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0  # (V,)
        return self._only_end if self._matcher.is_error() else allowed


Constrain = Callable[[Grammar], Constraint]
"""Begins a text under a grammar. Raises GrammarError where the grammar cannot be used."""


def nothing_constrains(_grammar: Grammar) -> Constraint:
    """Refuse every grammar, as a model without a tokenizer must."""
    raise GrammarError("this model cannot hold a text to a grammar")


class Grammars:
    """The grammars over one vocabulary of `size` ids. Compiled tables of the vocabulary are built when first needed.

    The COMPILED_MAX grammars that were used last are kept compiled. So whoever runs an event loop calls `constrain` on
    another thread first, which may take long, and then on the loop.
    """

    def __init__(self, tokenizer: "Tokenizer", size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self._eos_ids = eos_ids
        self._tables: Any = None
        self._building = Lock()
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # matchers before the first token, by source
        self._lock = Lock()

    def constrain(self, grammar: Grammar) -> Constraint:
        """Begin a text under a grammar. Any thread may call this.

        Raises:
            GrammarError: llguidance is not installed, the model has no end of text, or the grammar is wrong.
        """
        with self._lock:
            known = self._compiled.get(grammar.source)
            if known is not None:
                self._compiled.move_to_end(grammar.source)
                known = known.deep_copy()
        if known is None:
            known = self._compile(grammar.source)
        only_end = np.zeros(self._size, np.bool_)
        only_end[sorted(self._eos_ids)] = True
        return Constraint(known, grammar.start, only_end)

    def _compile(self, source: str) -> Any:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as exc:
            raise GrammarError(f"texts under a grammar need llguidance: pip install 'fedhlm[{EXTRA}]'") from exc
        if not self._eos_ids:
            raise GrammarError("a model without an end-of-text id cannot end a text under a grammar")
        with self._building:
            if self._tables is None:
                eos = sorted(self._eos_ids)
                self._tables = LLTokenizer(self._tokenizer.to_str(), n_vocab=self._size, eos_token=eos)
        matcher = LLMatcher(self._tables, source, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise GrammarError(f"grammar must be one that llguidance reads (got {reason[:256]})")
        with self._lock:
            self._compiled[source] = matcher.deep_copy()
            while len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
        return matcher
