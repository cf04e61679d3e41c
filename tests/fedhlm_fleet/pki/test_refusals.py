"""What a TLS error means in words, and that nothing else is taken for a refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.broker_url import tls_refusal


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required (_ssl.c:2580)",
            "set cert and key",
        ),
        ("[SSL: SSLV3_ALERT_CERTIFICATE_REVOKED] sslv3 alert certificate revoked (_ssl.c:2580)", "has been revoked"),
        ("[SSL: SSL/TLS_ALERT_CERTIFICATE_REVOKED] ssl/tls alert certificate revoked (_ssl.c:1)", "has been revoked"),
        ("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (_ssl.c:2580)", "another CA"),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1006)",
            "cannot be trusted: certificate has expired",
        ),
    ],
)
def test_an_alert_is_told_in_words(error: str, words: str) -> None:
    told = tls_refusal(f"the broker closed the connection before answering ({error})")
    assert told is not None
    assert words in told


@pytest.mark.parametrize(
    "error",
    [
        "[Errno 111] Connection refused",
        "[SSL: TLSV1_ALERT_INTERNAL_ERROR] tlsv1 alert internal error (_ssl.c:1006)",
        "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate is not yet valid (_ssl.c:1006)",
    ],
)
def test_what_may_pass_is_tried_again(error: str) -> None:
    assert tls_refusal(error) is None


@given(st.text())
def test_any_other_text_is_no_refusal(text: str) -> None:
    assert tls_refusal(text) is None or "alert" in text or "verify failed" in text
