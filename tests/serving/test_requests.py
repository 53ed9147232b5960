"""Parsing request bodies."""

import pytest

from ragtune_ray.serving import requests
from ragtune_ray.serving.requests import ApiError, RetrieveRequest


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(b"", "invalid_json", id="empty"),
        pytest.param(b"{", "invalid_json", id="cut"),
        pytest.param(b"\xff\xfe\xfa", "invalid_json", id="not UTF-8"),
        pytest.param(b"[]", "invalid_body", id="array"),
        pytest.param(b"null", "invalid_body", id="null"),
        pytest.param(b"3", "invalid_body", id="number"),
        pytest.param(b'"x"', "invalid_body", id="string"),
        pytest.param(b"[" * 100_000, "invalid_json", id="deep"),
        pytest.param(b'{"query": "x", "query": "y"}', "invalid_json", id="a field twice"),
        pytest.param(b'{"top_k": NaN}', "invalid_json", id="NaN"),
        pytest.param(b'{"\\ud800": 1}', "invalid_json", id="lone surrogate"),
        pytest.param(b'{"query": ""}', "invalid_value", id="no query"),
        pytest.param(b'{"query": "x", "surprise": 1}', "unknown_parameter", id="unknown field"),
    ],
)
def test_an_invalid_body_is_refused(raw: bytes, code: str) -> None:
    with pytest.raises(ApiError) as error:
        requests.parse(RetrieveRequest, raw)
    assert (error.value.status, error.value.code) == (400, code)


@pytest.mark.parametrize("text", ["x\0", "\ud83d", "x" * 9])
def test_a_text_that_is_too_long_or_no_unicode_is_refused(text: str) -> None:
    with pytest.raises(ApiError):
        requests.checked_text(text, "query", 8)
    assert requests.checked_text("\U0001f680", "query", 8) == "\U0001f680"
