"""Runs the LLM on a server that speaks vLLM's dialect of the OpenAI API over HTTP (docs/models.md).

The server is asked for the log-probabilities of the likeliest ids after token ids. They are those of the model itself,
before temperature and filters, which the cloud applies. A cache is the ids before: the server is expected to keep the
keys and values of prefixes that it has seen.

A few rows after a long prefix are asked for as several prompts of one request, each for one token. vLLM reads its
prefix cache for those, and does not for `prompt_logprobs`. A short text is asked for once with `prompt_logprobs`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_verifier.engine import Engine, EngineFailure, EngineInput, EngineOutput
from cloud_verifier.partial import row_of
from fedhlm.decoding.invariance import TOLERANCE
from fedhlm.decoding.spoken import configured_tokenizer
from fedhlm.decoding.vocabulary import Vocabulary
from fedhlm.errors import ConfigError, ModelError
from fedhlm.process.files import read_secret
from fedhlm.settings import ModelServer

if TYPE_CHECKING:
    import httpx
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

TOKENIZER_KEY: Final = "cloud.server.tokenizer"
PREFIX_BLOCK: Final = 16  # tokens in a block of vLLM's prefix cache: about what one more prompt computes again
ATTEMPTS: Final = 3
PAUSE_S: Final = 0.2  # before the second attempt; twice as long before each further one
CONNECTIONS: Final = 64
TOKEN_BYTES: Final = 8  # of an id in a prefix
RETRIED: Final = frozenset({429, 500, 502, 503, 504})
SHOWN: Final = 300  # characters of a server's own words in an error
ID_PREFIX: Final = "token_id:"
PROBE: Final = "Two rivers met in 1984: naïve café, 東京 and 🙂 — x = 3.14;\n\tif (a != b) { return; }\n"

PROBED: Final = 12  # ids for which log-probabilities are compared


def is_url(model: str) -> bool:
    """Whether a setting names a model behind a URL."""
    return model.lower().startswith(("http://", "https://"))


class _LogProbs(msgspec.Struct):
    top_logprobs: list[dict[str, float] | None] = []


class _Entry(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    index: int
    logprobs: _LogProbs | None = None
    prompt_logprobs: list[dict[str, _Entry] | None] | None = None
    prompt_token_ids: list[int] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Tokens(msgspec.Struct):
    tokens: list[int]


class Prefix(NamedTuple):
    """The cache of a server's model: the ids so far."""

    ids: tuple[int, ...]

    def truncated(self, length: int) -> "Prefix":
        """Return the prefix of the first `length` ids."""
        return self if length == len(self.ids) else Prefix(self.ids[:length])


class ServedModel(NamedTuple):
    """A model behind a server, checked: its engine, and what sessions and clients must know of it.

    `difference` is the largest change of a log-probability with the size of a block; 0 where it cannot be measured.
    """

    name: str
    folder: Path
    tokenizer: "Tokenizer"
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    bos_id: int | None
    context: int
    engine: Engine
    difference: float = 0.0


class ServerClient:
    """Asks one model of a server. `told` likeliest ids are wanted for each position; `size` ids have a meaning.

    Every error of a request is a ModelError that says what to do, where that is known.
    """

    def __init__(self, http: "httpx.AsyncClient", url: str, *, model: str, told: int, size: int) -> None:
        self._http = http
        self._url = url
        self.model = model
        self.told = told
        self._size = size
        self.scores_prompts = False  # whether the server knows prompt_logprobs

    async def forward(self, requests: Sequence[EngineInput]) -> list[EngineOutput | EngineFailure]:
        """Run several requests at the same time. One that fails does not hold up or spoil the others."""
        return await asyncio.gather(*(self._run(request) for request in requests))

    async def _run(self, request: EngineInput) -> EngineOutput | EngineFailure:
        ids = (*request.cache.ids, *request.ids)
        try:
            logits = await self.rows(ids, request.rows)
        except ModelError as exc:
            return EngineFailure(str(exc))
        return EngineOutput(logits, Prefix(ids))

    async def rows(self, ids: Sequence[int], rows: int, *, whole: bool | None = None) -> NDArray[np.float32]:
        """The rows of logits after the last `rows` ids, shape (rows, size).

        `whole` asks for them by `prompt_logprobs` of the whole text (True) or by a prompt for each row (False).

        Raises:
            ModelError: the server cannot be reached, refuses the request, or answers something else.
        """
        if not rows:
            return np.zeros((0, self._size), np.float32)
        if whole is None:
            whole = self.scores_prompts and rows > 1 and len(ids) <= PREFIX_BLOCK * rows
        asked: dict[str, Any] = {"prompt_logprobs": self.told} if whole else {}
        ends = (len(ids),) if whole else range(len(ids) - rows + 1, len(ids) + 1)
        choices = await self.complete([list(ids[:end]) for end in ends], **asked)
        last = [self._by_id(_first_of(choice)) for choice in choices]
        if whole:
            scored = choices[0].prompt_logprobs
            if scored is None or len(scored) != len(ids):
                raise ModelError(f"{self._url} must tell prompt_logprobs for {len(ids)} ids (got another number)")
            before = scored[len(ids) - rows + 1 :]
            last = [self._by_id({k: e.logprob for k, e in (entry or {}).items()}) for entry in before] + last
        return np.stack([row_of(values, self._size, self.told) for values in last])

    async def complete(self, prompts: list[list[int]] | str, **asked: Any) -> list[_Choice]:
        """Ask for one token after each prompt; the choices are in the order of the prompts.

        Raises:
            ModelError: as in `rows`.
        """
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self.told,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
            # A server may have other defaults from the model's generation_config.json.
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **asked,
        }
        answer = await self.post(f"{self._url}/completions", body, _Completion)
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        wanted = 1 if isinstance(prompts, str) else len(prompts)
        if [choice.index for choice in choices] != list(range(wanted)):
            raise ModelError(f"{self._url} must give one choice for each of {wanted} prompts (got {len(choices)})")
        return choices

    def _by_id(self, told: dict[str, float]) -> dict[int, float]:
        try:
            values = {int(name.removeprefix(ID_PREFIX)): value for name, value in told.items()}
        except ValueError as exc:
            raise ModelError(
                f"{self._url} must name tokens by their ids, as vLLM does with return_tokens_as_token_ids "
                f"(got {next(iter(told))[:SHOWN]!r})"
            ) from exc
        if len(values) < min(self.told, self._size) or not any(token < self._size for token in values):
            raise ModelError(
                f"{self._url} must tell the log-probabilities of {self.told} ids (got {len(values)}): "
                "set cloud.server.logprobs to what it allows"
            )
        return values

    async def get(self, url: str, kind: type[Any]) -> Any:
        """Get a document and decode it; see `rows` for errors."""
        return await self._ask("GET", url, None, kind)

    async def post(self, url: str, body: dict[str, Any], kind: type[Any]) -> Any:
        """Post a document and decode the answer; see `rows` for errors."""
        return await self._ask("POST", url, msgspec.json.encode(body), kind)

    async def _ask(self, method: str, url: str, content: bytes | None, kind: type[Any]) -> Any:
        response = await self._answered(method, url, content)
        if response.status_code != 200:
            raise ModelError(_refusal(url, response.status_code, response.text, self.model))
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ModelError(f"{url} must answer as vLLM does (got {response.text[:SHOWN]!r}: {exc})") from exc

    async def _answered(self, method: str, url: str, content: bytes | None) -> "httpx.Response":
        """The response to a request, which is sent again while the server cannot be reached or is overloaded."""
        import httpx

        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                response = await self._http.request(method, url, content=content)
            except httpx.TimeoutException as exc:
                # The server may still be at work on it: a second request would only add to its load.
                raise ModelError(f"{url} did not answer within cloud.server.timeout_s") from exc
            except httpx.InvalidURL as exc:
                raise ModelError(
                    f"cloud.model must be the URL of a server, such as http://localhost:8000/v1 (got {self._url!r}: {exc})"
                ) from exc
            except httpx.TransportError as exc:
                reason = f"{url} cannot be reached ({type(exc).__name__}: {exc})"
                continue
            if response.status_code not in RETRIED:
                return response
            reason = _refusal(url, response.status_code, response.text, self.model)
        raise ModelError(reason)


def _first_of(choice: _Choice) -> dict[str, float]:
    top = choice.logprobs.top_logprobs if choice.logprobs else []
    return (top[0] if top else None) or {}


def _refusal(url: str, status: int, text: str, model: str) -> str:
    """What a status other than 200 means, with the server's own words."""
    advice = {
        401: ": set cloud.server.key to a file with its API key",
        403: ": set cloud.server.key to a file with an API key that may use the model",
        404: f": no API of OpenAI is there, or no model {model!r} (cloud.server.name)",
    }.get(status, "")
    return f"{url} refuses the request with status {status}{advice} (it says {' '.join(text.split())[:SHOWN]!r})"


@asynccontextmanager
async def served(url: str, settings: ModelServer) -> AsyncIterator[ServedModel]:
    """Connect to a server, check that its model can verify, and yield it. The connections end when the context exits.

    Raises:
        ConfigError: a setting of `cloud.server` is missing or cannot be used.
        ModelError: the server cannot be reached, refuses to answer, or runs a model of another tokenizer.
    """
    try:
        import httpx
    except ModuleNotFoundError as exc:
        raise ModelError(f"a model at {url} needs httpx, which is not installed: pip install 'fedhlm[cloud]'") from exc
    spoken = configured_tokenizer(settings.tokenizer, key=TOKENIZER_KEY, whose="the server's model")
    url = url.rstrip("/")
    headers = {"content-type": "application/json"}
    if settings.key:
        headers["authorization"] = f"Bearer {read_secret(settings.key, key='cloud.server.key')}"
    limits = httpx.Limits(max_connections=CONNECTIONS)
    async with httpx.AsyncClient(headers=headers, timeout=settings.timeout_s, limits=limits) as http:
        told = settings.logprobs
        client = ServerClient(http, url, model=settings.name, told=told, size=spoken.vocabulary.size)
        context = await _choose(client, url, settings)
        await _check_tokens(client, url, spoken.tokenizer, settings.tokenizer)
        difference = await _check_scores(client, spoken.tokenizer, url)
        partly = told if told < spoken.vocabulary.size else 0
        engine = Engine(Prefix(()), client.forward, token_bytes=TOKEN_BYTES, told=partly)
        yield ServedModel(
            client.model,
            Path(settings.tokenizer),
            spoken.tokenizer,
            spoken.vocabulary,
            spoken.eos_ids,
            spoken.bos_id,
            context,
            engine,
            difference,
        )


async def _choose(client: ServerClient, url: str, settings: ModelServer) -> int:
    """Choose the model, and return its context in tokens, which leaves room for the token that is asked for."""
    cards: list[_Card] = (await client.get(f"{url}/models", _Cards)).data
    names = ", ".join(card.id for card in cards)
    if not settings.name and len(cards) != 1:
        raise ConfigError("cloud.server.name", "", f"one of the server's models: {names}")
    card = next((card for card in cards if card.id == (settings.name or card.id)), None)
    if card is None:
        raise ConfigError("cloud.server.name", settings.name, f"one of the server's models: {names}")
    client.model = card.id
    length = settings.context or card.max_model_len
    if length is None or length < 2:
        raise ConfigError(
            "cloud.server.context", settings.context, "the context of the model, which the server does not tell"
        )
    return length - 1


async def _check_tokens(client: ServerClient, url: str, tokenizer: "Tokenizer", path: str) -> None:
    """Compare how the server and we cut a text of many kinds into ids."""
    ours: list[int] = tokenizer.encode(PROBE, add_special_tokens=False).ids
    asked = {"model": client.model, "prompt": PROBE, "add_special_tokens": False}
    try:
        theirs = (await client.post(f"{url.removesuffix('/v1')}/tokenize", asked, _Tokens)).tokens
    except ModelError as exc:
        told = (await client.complete(PROBE, return_token_ids=True))[0].prompt_token_ids
        if told is None:
            raise ModelError(f"{url} must say how it cuts a text into tokens: {exc}") from exc
        theirs = told
    if theirs != ours:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise ModelError(
            f"tokenizer of {client.model} at {url} must be that of {path} ({TOKENIZER_KEY}): a test text has other "
            f"ids there, from token {at} on ({theirs[at : at + 3]}, and {ours[at : at + 3]} here)"
        )


async def _check_scores(client: ServerClient, tokenizer: "Tokenizer", url: str) -> float:
    """Ask for log-probabilities in both ways, warn if these differ, and return by how much."""
    ids: list[int] = tokenizer.encode(PROBE, add_special_tokens=False).ids[:PROBED]
    each = await client.rows(ids, len(ids), whole=False)
    try:
        whole = await client.rows(ids, len(ids), whole=True)
    except ModelError as exc:
        log.info("every position is asked for by itself, since the server tells no prompt_logprobs: %s", exc)
        return 0.0
    client.scores_prompts = True
    both = (each > each.min(axis=1, keepdims=True)) & (whole > whole.min(axis=1, keepdims=True))
    if (difference := float(np.abs(each - whole)[both].max())) > TOLERANCE:
        log.warning(
            "the log-probabilities of %s at %s change by up to %.3g with the size of a block: texts will leave those that "
            "it writes alone; start vLLM with VLLM_BATCH_INVARIANT=1, or serve the model in float32",
            client.model,
            url,
            difference,
        )
    return difference
