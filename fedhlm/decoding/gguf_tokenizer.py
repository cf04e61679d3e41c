"""The tokenizer of a GGUF file as one of the tokenizers library, with the ids that llama.cpp gives.

Byte-level BPE ("gpt2") and SentencePiece's BPE ("llama") are read; few models have others.
"""

from typing import TYPE_CHECKING, Any, Final

from fedhlm.decoding.gguf import Gguf
from fedhlm.decoding.vocabulary import Vocabulary, vocabulary_in
from fedhlm.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
# Types of tokens, by the format's numbers.
NORMAL: Final = 1
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS_OF_LLAMA3: Final = r"\p{N}{1,3}"


def _modern(digits: str) -> str:
    """The pattern that Llama 3 began, which differs between families by how digits are cut."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_PATTERNS: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("gpt-2", "phi-2", "mpt", "olmo", "jais"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"): (r"\p{N}", _GPT2),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "dbrx", "smaug-bpe"): (
        _modern(_DIGITS_OF_LLAMA3),
    ),
    ("qwen2", "deepseek-r1-qwen", "stablelm2"): (_modern(r"\p{N}"),),
}
PATTERNS: Final = {name: patterns for names, patterns in _PATTERNS.items() for name in names}
"""How a text is cut before its pieces become tokens: one pattern after the other, by the name of the pre-tokenizer."""
WHOLE_WORDS: Final = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral"})
"""Pre-tokenizers after which a piece that is a token stays whole, whatever the merges say."""


def tokens_of(gguf: Gguf) -> tuple[list[str], list[int]]:
    """The text and the type of each id, without unused ones at the end, which pad the table.

    Raises:
        ModelError: the file has no tokens.
    """
    texts = gguf.get("tokenizer.ggml.tokens", list, [])
    types = gguf.get("tokenizer.ggml.token_type", list, [NORMAL] * len(texts))
    if not texts or len(types) != len(texts):
        raise ModelError(f"{gguf.path} must list its tokens and a type of each (got {len(texts)} and {len(types)})")
    size = max((number + 1 for number, kind in enumerate(types) if kind != UNUSED), default=0)
    return texts[:size], types[:size]


def spoken_in(gguf: Gguf) -> tuple["Tokenizer", Vocabulary]:
    """The tokenizer of a file, and what its ids mean.

    Raises:
        ModelError: see `tokenizer_of`.
    """
    tokenizer = tokenizer_of(gguf)
    return tokenizer, vocabulary_in(tokenizer.to_str(), gguf.path)._replace(size=len(tokens_of(gguf)[0]))


def tokenizer_of(gguf: Gguf) -> "Tokenizer":
    """Build the tokenizer of a file.

    Raises:
        ModelError: the file has another kind of tokenizer, or a broken one.
    """
    texts, types = tokens_of(gguf)
    kind = gguf.get("tokenizer.ggml.model", str, "")
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in builders:
        raise ModelError(
            f"tokenizer.ggml.model of {gguf.path} must be one of {', '.join(sorted(builders))} (got {kind!r})"
        )
    from tokenizers import AddedToken

    try:
        tokenizer = builders[kind](gguf, texts)
    except ModelError:
        raise
    except Exception as exc:  # the tokenizers package raises bare Exception
        raise ModelError(f"the tokenizer of {gguf.path} cannot be used: {exc}") from exc
    named = [(text, kind) for text, kind in zip(texts, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    added = [AddedToken(text, special=kind == CONTROL, normalized=False) for text, kind in named]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_level(gguf: Gguf, texts: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = gguf.get("tokenizer.ggml.pre", str, "gpt-2")
    if name not in PATTERNS:
        raise ModelError(
            f"tokenizer.ggml.pre of {gguf.path} must be one of {', '.join(sorted(PATTERNS))} (got {name!r})"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.get("tokenizer.ggml.merges", list, [])]
    vocabulary = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(gguf: Gguf, texts: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = gguf.get("tokenizer.ggml.scores", list, [])
    if len(scores) != len(texts) and len(scores) < len(texts):
        raise ModelError(f"{gguf.path} must list a score of each token (got {len(scores)} of {len(texts)})")
    vocabulary = {text: number for number, text in enumerate(texts)}
    found = [
        (-scores[number], vocabulary[text[:cut]], vocabulary[text[cut:]], text[:cut], text[cut:])
        for text, number in vocabulary.items()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(found)]
    unknown = texts[gguf.get("tokenizer.ggml.unknown_token_id", int, 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = gguf.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return tokenizer
