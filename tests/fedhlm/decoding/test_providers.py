"""Execution providers: used in order where they are, the processor where they are not, one warning, clear errors."""

import logging
from importlib import resources
from pathlib import Path

import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.config import load
from fedhlm.decoding.decoder import CPU, Decoder, DecoderInput, usable_providers
from fedhlm.errors import ConfigError

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
NAMES = st.lists(st.sampled_from([CPU, CUDA, TENSORRT]))
SLM = Path(str(resources.files("fedhlm_zoo"))) / "artefacts" / "slm"


@given(NAMES, st.sets(st.sampled_from([CUDA, TENSORRT])))
def test_what_is_used_is_there_in_the_order_asked_for_and_ends_somewhere(wanted: list[str], there: set[str]) -> None:
    used = usable_providers(wanted, available=[*there, CPU])
    assert set(used) == ({*wanted} & {*there, CPU}) | {CPU}
    assert len(used) == len(set(used))
    asked = [name for name in dict.fromkeys(wanted) if name in used]
    assert [name for name in used if name in wanted] == asked


def test_a_decoder_falls_back_with_one_warning_and_computes_the_same(caplog: pytest.LogCaptureFixture) -> None:
    if CUDA in onnxruntime.get_available_providers():
        absent = "QNNExecutionProvider"
    else:
        absent = CUDA
    ids = [5, 6, 7]
    plain = Decoder.load(SLM)
    assert not caplog.records
    for _ in range(2):
        other = Decoder.load(SLM, providers=(absent,))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert absent in warnings[0].getMessage()
    (one,), (two,) = (d.forward([DecoderInput(d.empty_cache(), ids)]) for d in (plain, other))
    assert one.logits.tobytes() == two.logits.tobytes()


def test_providers_come_from_a_file_a_variable_or_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(f'[agent]\nproviders = ["{TENSORRT}", "{CUDA}"]\n')
    for text in (f"{TENSORRT},{CUDA}", f"{TENSORRT} {CUDA}", f'["{TENSORRT}", "{CUDA}"]', str((TENSORRT, CUDA))):
        loaded = [
            load(file=file, environ={}),
            load(environ={"FEDHLM_AGENT__PROVIDERS": text}),
            load(environ={}, flags={"agent.providers": text}),
        ]
        assert [one.config.agent.providers for one in loaded] == [(TENSORRT, CUDA)] * 3
    assert load(environ={}).config.cloud.providers == ()


@pytest.mark.parametrize("name", ["CUDA", "cudaexecutionprovider", "NoExecutionProvider"])
def test_an_unknown_provider_is_refused_and_the_known_ones_named(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"agent.providers must be .*{CUDA}.*got '{name}' from flag --agent.providers"
    ):
        load(environ={}, flags={"agent.providers": name})
    with pytest.raises(ConfigError, match="cloud.providers must be"):
        load(environ={"FEDHLM_CLOUD__PROVIDERS": name})
