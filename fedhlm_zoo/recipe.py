"""The recipe of the shipped pair: its stages in order, each a training run that can be stopped and resumed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from tokenizers import Tokenizer

from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm.errors import ConfigError
from fedhlm.process.files import replacing
from fedhlm_zoo.corpus import load_ag_news, load_news
from fedhlm_zoo.drafts import mix, write_drafts
from fedhlm_zoo.tokenizer import save_tokenizer, train_tokenizer
from fedhlm_zoo.train import SHAPES, Pack, TrainConfig, pack_documents, train

log = logging.getLogger(__name__)

VOCAB_SIZE: Final = 4096
DRAFT_TOKENS: Final = 700_000
# The unlabelled documents closest in style to the labelled ones; the others serve the tokenizer only.
NEWS_OF_PRETRAINING: Final = ("bbc_news", "onestopenglish_adv")


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One training run; `start_from` and `teacher` name earlier stages, `data` the text that it reads."""

    name: str
    config: TrainConfig
    data: Literal["ag", "ag+news", "ag+drafts"]
    start_from: str | None = None
    teacher: str | None = None


SHORT: Final[dict[str, Any]] = {"batch": 64, "length": 128, "micro_batch": 64}
LONG: Final[dict[str, Any]] = {"batch": 32, "length": 256, "micro_batch": 32}
CONSTANT: Final[dict[str, Any]] = {"decay_share": 0.0}
DECAY: Final[dict[str, Any]] = {"decay_share": 1.0, "warmup": 10}

RECIPE: Final = (
    Stage(name="slm-words", config=TrainConfig(shape=SHAPES["slm"], steps=480, **SHORT, **CONSTANT), data="ag"),
    Stage(name="llm-news", config=TrainConfig(shape=SHAPES["llm"], steps=400, **SHORT, **CONSTANT), data="ag+news"),
    Stage(
        name="llm",
        config=TrainConfig(shape=SHAPES["llm"], steps=360, seed=11, **LONG, **DECAY),
        data="ag",
        start_from="llm-news",
    ),
    Stage(
        name="slm-laws",
        config=TrainConfig(shape=SHAPES["slm"], steps=320, seed=13, **LONG, **DECAY),
        data="ag+drafts",
        start_from="slm-words",
        teacher="llm",
    ),
    Stage(
        name="slm",
        config=TrainConfig(shape=SHAPES["slm"], steps=220, seed=17, lr_matrix=0.012, lr_other=0.0015, **LONG, **DECAY),
        data="ag+drafts",
        start_from="slm-laws",
        teacher="llm",
    ),
)


def run_recipe(
    runs: Path,
    data: Path | None = None,
    *,
    recipe: Sequence[Stage] = RECIPE,
    vocab_size: int = VOCAB_SIZE,
    draft_tokens: int = DRAFT_TOKENS,
    until: str | None = None,
) -> dict[str, Path]:
    """Run the stages in order; keep what an earlier call finished under `runs`, and resume what it began.

    Args:
        runs: working folder; gets the tokenizer, the tokenised text and one folder per stage.
        data: folder with ``ag_news/`` (and ``news_text/``); None as in `corpus.load_ag_news`.
        recipe: the stages.
        vocab_size: entries of the tokenizer, where it is still to be trained.
        draft_tokens: how much text the teacher writes for a stage with data ``ag+drafts``.
        until: name of the last stage to run.

    Returns:
        The Hugging Face model directory of each finished stage.

    Raises:
        ConfigError: `until` names no stage.
        DataMissing: no training data.
    """
    if until is not None and until not in (names := [s.name for s in recipe]):
        raise ConfigError("until", until, f"one of {', '.join(names)}")
    runs.mkdir(parents=True, exist_ok=True)
    text = _Text(runs, data, vocab_size=vocab_size, draft_tokens=draft_tokens)
    done: dict[str, Path] = {}
    for stage in recipe:
        model_dir = runs / stage.name / "model"
        if (model_dir / "config.json").is_file():
            log.info("stage %s is done", stage.name)
        else:
            log.info("stage %s begins", stage.name)
            train(
                runs / stage.name,
                stage.config,
                text.pack(stage, done),
                text.tokenizer().get_vocab_size(),
                start_from=done[stage.start_from] if stage.start_from else None,
                teacher_dir=done[stage.teacher] if stage.teacher else None,
            )
        done[stage.name] = model_dir
        if stage.name == until:
            break
    return done


class _Text:
    """The tokenizer and the tokenised texts of a working folder, made once and kept there."""

    def __init__(self, runs: Path, data: Path | None, *, vocab_size: int, draft_tokens: int) -> None:
        self._runs = runs
        self._data = data
        self._vocab_size = vocab_size
        self._draft_tokens = draft_tokens

    def tokenizer(self) -> Tokenizer:
        folder = self._runs / "tok"
        if not (folder / TOKENIZER_FILE).is_file():
            documents = [a.document for a in load_ag_news("train", self._data)]
            save_tokenizer(train_tokenizer(documents * 2 + load_news(self._data), self._vocab_size), folder)
        return Tokenizer.from_file(str(folder / TOKENIZER_FILE))

    def pack(self, stage: Stage, done: Mapping[str, Path]) -> Pack:
        if stage.data != "ag+drafts":
            return self._kept(
                stage.data, lambda: self._labelled(NEWS_OF_PRETRAINING if stage.data == "ag+news" else ())
            )
        if stage.teacher is None:
            raise ConfigError(
                f"recipe.{stage.name}.teacher", None, "the model that writes the drafts which this stage reads"
            )
        teacher = done[stage.teacher]
        drafts = self._kept(
            f"drafts-{stage.teacher}",
            lambda: write_drafts(
                teacher, self.tokenizer(), load_ag_news("train", self._data), tokens=self._draft_tokens
            ),
        )
        real = self._kept("ag", lambda: self._labelled(()))
        config = stage.config
        return mix(real, drafts, tokens=config.steps * config.batch * config.length + config.batch * config.length)

    def _labelled(self, news: tuple[str, ...]) -> Pack:
        return pack_documents(self.tokenizer(), load_ag_news("train", self._data), load_news(self._data, news))

    def _kept(self, name: str, make: Callable[[], Pack]) -> Pack:
        path = self._runs / f"pack-{name}.npz"
        if not path.is_file():
            with replacing(path) as file:
                make().save(file)
        return Pack.load(path)
