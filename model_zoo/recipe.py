"""How the shipped pair was made: the stages in order, each a training run that can be stopped and resumed."""

from typing import Final, Literal

import msgspec

from model_zoo.train import SHAPES, TrainConfig


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One training run; `start_from` and `teacher` name earlier stages, `data` the text it reads."""

    name: str
    config: TrainConfig
    data: Literal["ag", "ag+news", "ag+drafts"]
    start_from: str | None = None
    teacher: str | None = None


SHORT: Final = {"batch": 64, "length": 128, "micro_batch": 64}
LONG: Final = {"batch": 32, "length": 256, "micro_batch": 32}
CONSTANT: Final = {"decay_share": 0.0}
DECAY: Final = {"decay_share": 1.0, "warmup": 10}

RECIPE: Final = (
    Stage(name="slm-words", config=TrainConfig(shape=SHAPES["slm"], steps=480, **SHORT, **CONSTANT), data="ag"),
    Stage(name="llm-news", config=TrainConfig(shape=SHAPES["llm"], steps=800, **SHORT, **CONSTANT), data="ag+news"),
    Stage(
        name="llm",
        config=TrainConfig(shape=SHAPES["llm"], steps=440, seed=11, **LONG, **DECAY),
        data="ag",
        start_from="llm-news",
    ),
    Stage(
        name="slm",
        config=TrainConfig(shape=SHAPES["slm"], steps=500, seed=13, **LONG, **DECAY),
        data="ag+drafts",
        start_from="slm-words",
        teacher="llm",
    ),
)
