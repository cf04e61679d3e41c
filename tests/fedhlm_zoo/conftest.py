"""Tiny models and a tokenizer that knows the topics, made once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedhlm_zoo.prompts import load_items


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Source directory and fp32 model folder of one tiny architecture."""
    pytest.importorskip("torch", reason="makes its models with torch")
    pytest.importorskip("optimum.exporters.onnx", reason="exports its models with optimum")
    from fedhlm_zoo.export import export
    from fedhlm_zoo.tiny import make_tiny

    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            source = make_tiny(kind, root / "source", seed=3)
            export(source, root / "onnx")
            made[kind] = (source, root / "onnx")
        return made[kind]

    return get


@pytest.fixture(scope="session")
def news_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer of 512 entries, trained on the project's own news items."""
    pytest.importorskip("transformers", reason="writes the tokenizer's configuration with transformers")
    from fedhlm_zoo.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([a.document for a in load_items()], 512), folder)
    return folder


@pytest.fixture(scope="session")
def news_model(tmp_path_factory: pytest.TempPathFactory, news_tokenizer: Path) -> Callable[[int], Path]:
    """A tiny random Llama over `news_tokenizer`, as a Hugging Face directory, by seed."""
    pytest.importorskip("torch", reason="makes its models with torch")
    from fedhlm_zoo.train import SHAPES, new_model

    made: dict[int, Path] = {}

    def get(seed: int) -> Path:
        if seed not in made:
            model = new_model(SHAPES["tiny"], 512, seed)
            with_spread = {n: p * 8 if p.ndim == 2 else p for n, p in model.state_dict().items()}
            model.load_state_dict(with_spread)
            made[seed] = tmp_path_factory.mktemp("news-model")
            model.save_pretrained(made[seed])
            for file in news_tokenizer.iterdir():
                (made[seed] / file.name).write_bytes(file.read_bytes())
        return made[seed]

    return get
