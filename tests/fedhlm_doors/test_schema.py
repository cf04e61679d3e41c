"""Input of every kind, made from the OpenAPI document: whatever comes, the answer is one that the document names."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fedhlm_doors.house import House, house

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
EXAMPLES = 25
TOKENS = 2
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def doors() -> Iterator[House]:
    with house("lonely", preset="slm-only") as built:
        yield built


def short(body: Any) -> Any:
    """The same body, but no long answer and few choices."""
    if not isinstance(body, dict):
        return body
    for holder in (body, body.get("options")):
        for name in ("max_tokens", "max_completion_tokens", "num_predict", "n"):
            if isinstance(holder, dict) and type(holder.get(name)) is int and holder[name] > TOKENS:
                holder[name] = TOKENS
    return body


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/api/chat", "/api/generate", "/api/show", "/api/pull", "/api/tags"],
)  # fmt: skip
def test_an_answer_is_one_that_the_document_names(doors: House, path: str) -> None:
    url = doors.urls["lonely"]
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: Any = schema.get_all_operations()
    operations = [result.ok() for result in found]
    (operation,) = (one for one in operations if one.path == path)
    tried = 0

    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(
        case=operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    )
    def attempt(case: Any) -> None:
        nonlocal tried
        tried += 1
        case.body = short(case.body)
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)

    attempt()
    assert tried >= 1
