"""A request over HTTP is a part of its client's trace."""

import httpx
import pytest

from fedhlm.opentelemetry import OtelTracer
from tests.fedhlm.test_spans import ABOVE, OTHER
from tests.fedhlm_doors.house import PROMPT, House
from tests.field.test_spans import exported, named, parents

PATIENCE_S = 60.0


@pytest.mark.parametrize("part", ["lonely", "cloud"])
def test_a_request_over_http_is_inside_the_span_that_its_header_names(part: str) -> None:
    kept, provider = exported()
    built = House(preset="slm-only")
    built.tracer = OtelTracer(provider)
    with built:
        built.start(part)
        built.wait(part)
        url = built.urls[part]
        (model,) = httpx.get(f"{url}/v1/models").json()["data"][:1]
        for path, header in (("/v1/completions", ABOVE), ("/api/generate", "nonsense"), ("/v1/completions", OTHER)):
            body = {"model": model["id"], "prompt": PROMPT, "stream": False}
            answer = httpx.post(url + path, json=body, headers={"traceparent": header}, timeout=PATIENCE_S)
            assert answer.status_code == 200, answer.text
    inside, alone = named(kept, "request")  # the third client does not sample its trace
    assert parents([inside]) == {int(ABOVE[36:52], 16)}
    assert inside.context.trace_id == int(ABOVE[3:35], 16)
    assert alone.parent is None
    assert PROMPT not in str(inside.to_json())
