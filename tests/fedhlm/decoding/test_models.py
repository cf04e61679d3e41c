"""The table of backends: what runs a model is told by its path or URL; onnxruntime, the default, conforms."""

import sys
from pathlib import Path

import pytest

from fedhlm.decoding import models
from fedhlm.decoding.models import Backend, LoadedModel, load_model
from fedhlm.errors import ModelError
from fedhlm_zoo.shipped import model_folder
from tests.fedhlm.decoding.conformance import Conformance


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(model_folder("", "llm"))


class TestOnnx(Conformance):
    """The shipped LLM."""


def test_the_first_backend_that_takes_a_model_runs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "toys.py").write_text("def opened(model, **how):\n    return model, sorted(how)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    toy = Backend(lambda model: model.endswith(".toy"), "toys:opened", "toys", "toys")
    monkeypatch.setattr(models, "BACKENDS", {"toy": toy, **models.BACKENDS})
    assert "toys" not in sys.modules
    with pytest.raises(ModelError, match="model folder must be"):
        load_model("nowhere")
    assert "toys" not in sys.modules  # imported when one is asked for
    opened: object = load_model(Path("a.toy"))
    assert opened == ("a.toy", ["context", "drafting", "keeps_memory", "providers", "threads"])


@pytest.mark.parametrize(("library", "told"), [("absent_library", True), ("other", False)])
def test_a_library_that_is_not_installed_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, told: bool
) -> None:
    (tmp_path / "lacking.py").write_text("import absent_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(models, "BACKENDS", {"toy": Backend(lambda _model: True, "lacking:load", library, "toys")})
    expected = (ModelError, r"needs absent_library, which is not installed: pip install 'fedhlm\[toys\]'")
    kind, message = expected if told else (ModuleNotFoundError, "absent_library")
    with pytest.raises(kind, match=message):
        load_model("some.toy")
