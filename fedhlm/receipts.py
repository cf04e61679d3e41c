"""Receipts: a device's claim that a text is the LLM's own, and the check of that claim with the LLM.

Under a shared coupling the LLM's text is a function of prompt, sampling and seed. A receipt names them, so whoever has
the LLM can write the text again and compare. Another machine may decide a near tie otherwise, because its kernels round
otherwise; the check therefore looks at each token after the text before it, and says how many differ.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from fedhlm.decoding.alone import Alone
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.errors import ReceiptError
from fedhlm.protocol.messages import Fingerprint, Grammar, Sampling

KIND: Final = "fedhlm-receipt/1"
ROWS: Final = 64  # positions whose logits are held at once


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a device says about a text that the LLM has verified token by token.

    `prompt` and `text` are SHA-256 digests of token ids (`digest`). `model`, `tokenizer`, `vocab_size` and `noise` are
    the LLM's fingerprint. `made_ms` is Unix time. `certificate` is the PEM of the device's certificate, and `signature`
    its base64 signature of the receipt without these two.
    """

    kind: str = KIND
    agent: str
    cluster: str
    made_ms: int
    model: str
    tokenizer: str
    vocab_size: int
    noise: str
    coupling: str
    seed: int
    temperature: float
    top_p: float
    top_k: int | None = None
    min_p: float | None = None
    grammar: str | None = None
    prompt: str
    prompt_tokens: int
    text: str
    tokens: int
    certificate: str = ""
    signature: str = ""

    @property
    def sampling(self) -> Sampling:
        """The sampling of the text."""
        grammar = None if self.grammar is None else Grammar(self.prompt_tokens, self.grammar)
        return Sampling(
            self.seed, self.temperature, self.top_p, self.coupling, self.top_k, self.min_p, grammar
        )  # fmt: skip

    def body(self) -> bytes:
        """The bytes that a signature covers."""
        return msgspec.json.encode(msgspec.structs.replace(self, certificate="", signature=""))


def digest(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, four little-endian bytes each, in hex."""
    return hashlib.sha256(np.asarray(ids, "<u4").tobytes()).hexdigest()


def receipt_of(
    sampling: Sampling,
    large: Fingerprint,
    *,
    agent: str,
    cluster: str,
    made_ms: int,
    prompt: Sequence[int],
    ids: Sequence[int],
) -> Receipt:
    """The receipt of a text, not signed."""
    return Receipt(
        agent=agent,
        cluster=cluster,
        made_ms=made_ms,
        model=large.model,
        tokenizer=large.tokenizer,
        vocab_size=large.vocab_size,
        noise=large.noise,
        coupling=sampling.coupling,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        grammar=None if sampling.grammar is None else sampling.grammar.source,
        prompt=digest(prompt),
        prompt_tokens=len(prompt),
        text=digest(ids),
        tokens=len(ids),
    )


Sign = Callable[[Receipt], Receipt]
"""Adds a device's signature to a receipt."""


def unsigned(receipt: Receipt) -> Receipt:
    """Leave a receipt as it is, where the device has no key."""
    return receipt


def proof_of(receipt: Receipt | None, prompt: Sequence[int]) -> dict[str, Any]:
    """What `fedhlm verify-receipt` needs of an answer besides its ids; empty without a receipt."""
    return {} if receipt is None else {"receipt": msgspec.to_builtins(receipt), "prompt_ids": list(prompt)}


class Difference(NamedTuple):
    """A token of a text, by its number in the text, and the one that the LLM writes after the text before it."""

    number: int
    token: int
    of_llm: int


def check_digests(receipt: Receipt, prompt: Sequence[int], ids: Sequence[int]) -> None:
    """Check that a receipt is about this prompt and this text.

    Raises:
        ReceiptError: it is about others.
    """
    for what, given, known in (("prompt", prompt, receipt.prompt), ("text", ids, receipt.text)):
        if digest(given) != known:
            raise ReceiptError(
                f"the receipt is not about this {what}: its digest is {known[:16]}..., not {digest(given)[:16]}..."
            )


def differences(receipt: Receipt, prompt: Sequence[int], ids: Sequence[int], llm: Alone) -> Iterator[Difference]:
    """Yield every token that the LLM would not have written after the text before it.

    Raises:
        ReceiptError: the coupling does not make a text a function of prompt, sampling and seed.
        GrammarError: the grammar cannot be used here.
    """
    sampling, decoder = receipt.sampling, llm.decoder
    coupling = COUPLINGS.get(sampling.coupling)
    if coupling is None or not coupling.shared:
        raise ReceiptError(f"coupling must be one with shared noise (got {sampling.coupling!r})")
    held = None if sampling.grammar is None else decoder.constrain(sampling.grammar)
    context, cache = [*prompt, *ids], decoder.empty_cache()
    for first in range(len(prompt), len(context), ROWS):
        last = min(first + ROWS, len(context))
        feed = context[cache.length : last - 1]
        result = decoder.forward([DecoderInput(cache, feed, last - first)])[0]
        cache = result.cache
        for position, row in enumerate(result.logits, start=first):
            possible = row if held is None else held.masked(row, context[:position])
            of_llm = coupling.settle(possible, sampling, position, None, b"")
            if of_llm != context[position]:
                yield Difference(position - len(prompt), context[position], of_llm)
