"""API keys: parsing, lookup, rights and limits."""

import hashlib
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.generation.openai_client import is_loopback
from ragtune_ray.serving.api_keys import Key, Keys, Usage, load_keys
from ragtune_ray.serving.requests import ApiError

SECRET = "correct-horse-battery"


def write(path: Path, text: str) -> config.Config:
    path.write_text(text)
    return config.Config().using(f"serve.keys_path={path}")


def test_only_the_digest_of_a_key_is_kept(tmp_path: Path) -> None:
    keys = load_keys(write(tmp_path / "k.yaml", f"keys: [{{name: a, key: {SECRET}}}]"))
    found = keys.find(SECRET)
    assert found is not None
    assert found.sha256 == hashlib.sha256(SECRET.encode()).hexdigest()
    assert SECRET not in repr(vars(keys)) + repr(found)
    assert keys.find(SECRET + "x") is None
    assert keys.find("") is None
    assert keys.find("\ud800") is None


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("ragtune_ray.serving.api_keys.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    keys = Keys([Key.model_validate({"name": f"k{n}", "key": f"{SECRET}-{n}"}) for n in range(3)])
    for presented in (f"{SECRET}-0", f"{SECRET}-2", "wrong"):
        compared.clear()
        keys.find(presented)
        assert len(compared) == 3


def test_keys_come_from_the_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGTUNE_API_KEYS", "environment-key-1, environment-key-2")
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    keys = load_keys(write(tmp_path / "k.yaml", f"keys: [{{name: a, sha256: {digest}, admin: true}}]"))
    assert [keys.find(text).name for text in (SECRET, "environment-key-1", "environment-key-2")] == [
        "a",
        "RAGTUNE_API_KEYS-1",
        "RAGTUNE_API_KEYS-2",
    ]
    assert keys.find(SECRET).admin
    assert not keys.find("environment-key-1").admin


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("keys: []", "at least one key", id="empty"),
        pytest.param("[1]", "at least one key", id="no mapping"),
        pytest.param("keys: [{name: a}]", "neither `key` nor `sha256`", id="no key"),
        pytest.param("keys: [{name: a, key: short}]", "16 ASCII characters", id="short"),
        pytest.param(f"keys: [{{name: a, key: {SECRET}, sha256: {'0' * 64}}}]", "not both", id="both"),
        pytest.param(f"keys: [{{name: a b, key: {SECRET}}}]", "name", id="name"),
        pytest.param(f"keys: [{{name: a, key: {SECRET}, rights: all}}]", "rights", id="unknown field"),
        pytest.param(f"keys: [{{name: a, key: {SECRET}, admin: true, tenant: t}}]", "no `tenant`", id="admin's tenant"),
        pytest.param(f"keys: [{{name: a, key: {SECRET}}}, {{name: b, key: {SECRET}}}]", "the same key", id="twice"),
        pytest.param(f"keys: [{{name: a, key: {SECRET}, tenant: t}}]", "index.tenant_field", id="tenant of nothing"),
        pytest.param(f'keys: [{{name: a, key: "{SECRET}', "is not YAML", id="broken"),
    ],
)
def test_an_invalid_file_is_refused_without_quoting_the_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        load_keys(write(tmp_path / "k.yaml", text))
    assert named in str(error.value)
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None


def test_keys_must_name_a_tenant_if_documents_have_tenants(tmp_path: Path) -> None:
    settings = write(tmp_path / "k.yaml", f"keys: [{{name: a, key: {SECRET}}}]").using("index.tenant_field=tenant")
    with pytest.raises(config.ConfigError, match=r"tenant_field is 'tenant'"):
        load_keys(settings)


def test_the_rate_limit_is_a_token_bucket_with_retry_after() -> None:
    now = [0.0]
    usage = Usage(clock=lambda: now[0])
    key = Key.model_validate({"name": "a", "key": SECRET, "requests_per_minute": 30})
    for _ in range(3):  # a tenth of the rate per minute
        usage.enter(key)
    with pytest.raises(ApiError) as error:
        usage.enter(key)
    assert (error.value.status, error.value.code) == (429, "rate_limit")
    assert error.value.headers() == {"Retry-After": "2"}
    now[0] += 2.0  # one token every two seconds
    usage.enter(key)
    with pytest.raises(ApiError):
        usage.enter(key)
    now[0] += 3600
    for _ in range(3):
        usage.enter(key)
    with pytest.raises(ApiError):
        usage.enter(key)


def test_the_concurrency_limit_counts_per_key() -> None:
    usage = Usage()
    one, other = (Key.model_validate({"name": n, "key": SECRET + n, "concurrency": 2}) for n in "ab")
    usage.enter(one)
    usage.enter(one)
    usage.enter(other)
    with pytest.raises(ApiError) as error:
        usage.enter(one)
    assert error.value.code == "concurrency_limit"
    usage.leave(one)
    usage.enter(one)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1:80", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("::1", True),
        ("", False),
        ("0.0.0.0", False),  # noqa: S104
        ("localhost.evil.example", False),
        ("127.0.0.1.nip.io", False),
        ("2130706433", False),
        ("192.168.0.1", False),
        ("127.0.0.1@evil.example", False),
    ],
)
def test_loopback_hosts_are_recognized(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
