"""Quantising a model reports what it cost, in numbers that tell one mode from another, and keeps them in the card."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fedhlm.decoding.invariance import TOLERANCE

pytest.importorskip("onnx", reason="edits graphs with onnx")
pytest.importorskip("torch", reason="makes its models with torch")

from fedhlm_fleet.cli import main
from fedhlm_zoo.cards import CARD_FILE
from fedhlm_zoo.report import REPORT_FILE, QuantisationFigures

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def test_quantising_reports_every_mode_in_print_and_in_the_card(
    exported: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "mine.txt"
    texts.write_text("Two rivers met.\n\nOil rises, and with it the price of bread.\n")
    out = tmp_path / "out"
    asked = ["models", "quantise", str(exported("llama")[1]), str(out), "--mode", "weights-int8"]
    assert main([*asked, "--texts", str(texts), "--compare"]) == 0
    figures = msgspec.json.decode((out / REPORT_FILE).read_bytes(), type=list[QuantisationFigures])
    by_form = {f.form: f for f in figures}
    assert list(by_form) == ["fp32", "weights-int8", "int8-dynamic", "weights-fp16"]
    assert by_form["fp32"].top1 == 1.0
    assert by_form["fp32"].kl == pytest.approx(0.0, abs=1e-9)
    assert 0.0 < by_form["weights-fp16"].kl < by_form["weights-int8"].kl < by_form["int8-dynamic"].kl < 0.2
    assert by_form["weights-fp16"].top1 >= by_form["int8-dynamic"].top1 > 0.7
    assert by_form["int8-dynamic"].block_difference > TOLERANCE > by_form["weights-int8"].block_difference
    assert all(f.step_tokens_s > 0.0 and f.block_tokens_s > 0.0 and f.tokens > 40 for f in figures)
    assert by_form["weights-int8"].graph_bytes < by_form["weights-fp16"].graph_bytes < by_form["fp32"].graph_bytes
    card, shown = (out / CARD_FILE).read_text("utf-8"), capsys.readouterr().out
    for form in by_form:
        assert f"| {form} |" in card
        assert f"| {form} |" in shown
    assert f"{by_form['int8-dynamic'].kl:.4f}" in card
    assert main([*asked[:3], str(tmp_path / "b"), "--texts", str(tmp_path / "none")]) == 2
    assert "file of texts must be readable" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
