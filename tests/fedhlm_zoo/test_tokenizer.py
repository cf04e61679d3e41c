"""How a text begins is what the tokenizer says, and not what the model's configuration names by the way."""

import json
from pathlib import Path
from typing import Any, Final

import pytest
from tokenizers import Tokenizer, processors

from fedhlm.decoding.hub import TOKENIZER_CONFIG_FILE, begin_id
from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm.errors import ModelError
from fedhlm_zoo.tiny import byte_tokenizer
from fedhlm_zoo.tokenizer import END_OF_TEXT, save_tokenizer

BEGIN, OTHER, CONFIGURED = "<s>", "<sop>", 1
BEGIN_ID, OTHER_ID = 257, 258
PLAIN: Final = ""
ADDS_ONE: Final = f"{BEGIN} $A"
ADDS_AN_END: Final = f"$A {END_OF_TEXT}"
ADDS_BOTH: Final = f"{BEGIN} $A {END_OF_TEXT}"
ADDS_TWO: Final = f"{OTHER} {BEGIN} $A"


def folder_of(folder: Path, template: str, **config: Any) -> Path:
    """A folder with a byte tokenizer that adds what `template` says, and with a configuration if one is given."""
    tokenizer: Tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([BEGIN, OTHER])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(BEGIN, BEGIN_ID), (OTHER, OTHER_ID), (END_OF_TEXT, 0)]
        )
    tokenizer.save(str(folder / TOKENIZER_FILE))
    if config:
        (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("template", "expected"), [(PLAIN, None), (ADDS_ONE, BEGIN_ID), (ADDS_AN_END, None), (ADDS_BOTH, BEGIN_ID)]
)
@pytest.mark.parametrize("config", [{}, {"bos_token": OTHER}, {"bos_token": OTHER, "add_bos_token": None}])
def test_without_a_word_it_is_what_the_tokenizer_adds(
    tmp_path: Path, template: str, expected: int | None, config: dict[str, Any]
) -> None:
    assert begin_id(folder_of(tmp_path, template, **config), CONFIGURED) == expected


@pytest.mark.parametrize("template", [PLAIN, ADDS_ONE, ADDS_TWO])
def test_add_bos_token_comes_first(tmp_path: Path, template: str) -> None:
    assert begin_id(folder_of(tmp_path, template, add_bos_token=False, bos_token=BEGIN), CONFIGURED) is None
    assert begin_id(folder_of(tmp_path, template, add_bos_token=True, bos_token=OTHER), CONFIGURED) == OTHER_ID
    named = {"content": BEGIN, "lstrip": False}
    assert begin_id(folder_of(tmp_path, template, add_bos_token=True, bos_token=named), CONFIGURED) == BEGIN_ID
    assert begin_id(folder_of(tmp_path, template, add_bos_token=True), CONFIGURED) == CONFIGURED


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must be at most one \(got the ids \[258, 257\]\)"):
        begin_id(folder_of(tmp_path, ADDS_TWO), CONFIGURED)
    with pytest.raises(ModelError, match=r"must be a token of tokenizer\.json.*'<none>'"):
        begin_id(folder_of(tmp_path, PLAIN, add_bos_token=True, bos_token="<none>"), CONFIGURED)
    with pytest.raises(ModelError, match=r"must be a token of tokenizer\.json.*got None"):
        begin_id(folder_of(tmp_path, PLAIN, add_bos_token=True), None)
    for content in ("{", "[]"):
        (tmp_path / TOKENIZER_CONFIG_FILE).write_text(content, "utf-8")
        with pytest.raises(ModelError, match=r"tokenizer_config\.json must be a JSON object"):
            begin_id(tmp_path, CONFIGURED)
    (tmp_path / TOKENIZER_FILE).write_text("{}", "utf-8")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        begin_id(tmp_path, CONFIGURED)


def test_texts_of_our_own_models_begin_with_end_of_text(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="writes the tokenizer's configuration with transformers")
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    assert begin_id(tmp_path, None) == tokenizer.token_to_id(END_OF_TEXT)
