"""API keys: what each key may see and do, and how often.

Keys come from a YAML file or an environment variable. Only their sha256 is kept in memory.

    keys:
      - name: search-page            appears in logs; the key itself never does
        key: 3f9c...                 at least 16 characters; or `sha256`, its digest, so that the file contains no secret
        tenant: acme                 required if index.tenant_field is set: the only documents that this key sees
        requests_per_minute: 600     0: no limit
        concurrency: 8               requests in flight at once; 0: no limit
      - name: operator
        sha256: 9b74...
        admin: true                  may change documents and read metrics; has no tenant
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ragtune_ray import config
from ragtune_ray.index import filters
from ragtune_ray.serving.requests import ApiError

Right = Literal["public", "key", "admin"]
"""What a route requires: nothing, any key, or an admin key."""
MIN_KEY_CHARACTERS = 16


class Key(BaseModel):
    """One API key and its rights."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    tenant: str = ""
    admin: bool = False
    requests_per_minute: float = Field(0.0, ge=0)
    concurrency: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _replace_key_by_digest(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "key" not in given:
            return given
        secret = given["key"]
        if "sha256" in given:
            raise ValueError("set `key` or `sha256`, not both")
        if not isinstance(secret, str) or len(secret) < MIN_KEY_CHARACTERS or not secret.isascii():
            raise ValueError(f"`key` must be at least {MIN_KEY_CHARACTERS} ASCII characters, quoted")
        return {**{name: value for name, value in given.items() if name != "key"}, "sha256": key_digest(secret)}

    @model_validator(mode="after")
    def _check_rights(self) -> Self:
        if not self.sha256 and self.name != "anyone":
            raise ValueError("has neither `key` nor `sha256`; set one of them")
        if self.admin and self.tenant:
            raise ValueError("an admin key can have no `tenant`, since it changes the documents of all tenants")
        return self


ANYONE = Key(name="anyone", admin=True)
"""The key of local clients if no keys are configured, and of all clients on public routes."""


def key_digest(secret: str) -> str:
    """The sha256 of a key, in hexadecimal.

    >>> key_digest("a")[:8]
    'ca978112'
    """
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """The configured keys; falsy if there are none."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = tuple(keys)
        self._digests = [bytes.fromhex(key.sha256) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, presented: str) -> Key | None:
        """The matching key, in a time that depends neither on which key matches nor on how many characters do."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        found = None
        for key, known in zip(self._keys, self._digests, strict=True):
            if hmac.compare_digest(digest, known):
                found = key
        return found


def visible_filter(settings: config.Config, key: Key, requested: dict[str, Any] | None) -> filters.Filter:
    """Which documents a request may see: those that pass `retrieval.filter`, the key's tenant and the request's filter.

    Raises:
        ApiError: 400, the request's filter is malformed; 403, documents have tenants and the key has none.
    """
    parts = [filters.parse_filter(settings.retrieval.filter)]
    field_name = settings.index.tenant_field
    if field_name:
        tenant = settings.retrieval.tenant if key is ANYONE else key.tenant
        if not tenant:
            raise ApiError(403, "documents here belong to tenants, and this key has no tenant", code="no_tenant")
        parts.append(filters.tenant_filter(field_name, tenant))
    return filters.combine(*parts, requested_filter(requested))


def requested_filter(requested: dict[str, Any] | None) -> filters.Filter:
    """The filter of a request; ApiError 400 if it is malformed."""
    try:
        return filters.parse_filter(requested or {})
    except (ValueError, RecursionError, TypeError) as error:
        raise ApiError(400, str(error)[:300], code="invalid_filter", param="filter") from None


def load_keys(settings: config.Config) -> Keys:
    """The keys in the file `serve.keys_path` and in the environment variable `serve.keys_env`.

    Raises:
        config.ConfigError: the file cannot be read, a key is malformed, or two share a name or a secret.
    """
    found = _from_file(settings.serve.keys_path) if settings.serve.keys_path else []
    variable = settings.serve.keys_env
    secrets = [secret.strip() for secret in os.environ.get(variable, "").split(",") if secret.strip()]
    for number, secret in enumerate(secrets, start=1):
        found.append(_key({"name": f"{variable}-{number}", "key": secret}, f"environment variable {variable}"))
    for attribute in ("name", "sha256"):
        values = [getattr(key, attribute) for key in found]
        if len(set(values)) < len(values):
            raise config.ConfigError(f"API keys: two entries have the same {'name' if attribute == 'name' else 'key'}")
    field_name = settings.index.tenant_field
    for key in found:
        if bool(key.tenant) != bool(field_name) and not key.admin:
            raise config.ConfigError(
                f"API key {key.name}: tenant is {key.tenant!r} but index.tenant_field is {field_name!r}; set both or neither"
            )
    return Keys(found)


def _from_file(path: str) -> list[Key]:
    where = f"serve.keys_path {path}"
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise config.ConfigError(f"{where}: cannot read the file ({error.strerror}); name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        raise config.ConfigError(f"{where}: is not YAML in UTF-8") from None  # the cause could quote a key
    rows = values.get("keys") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not rows:
        raise config.ConfigError(f"{where}: must contain a list `keys:` of at least one key")
    return [_key(row, f"{where}, key {number}") for number, row in enumerate(rows, start=1)]


def _key(row: Any, where: str) -> Key:
    try:
        return Key.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field_name = ".".join(str(part) for part in first["loc"])
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise config.ConfigError(f"{where}: {field_name + ': ' if field_name else ''}{reason}") from None


@dataclass(slots=True)
class _TokenBucket:
    tokens: float
    updated: float
    running: int = 0


@dataclass(slots=True)
class Usage:
    """Recent use of each key, counted per ingress process."""

    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, _TokenBucket] = field(default_factory=dict)

    def enter(self, key: Key) -> None:
        """Count a request until `leave`, or raise ApiError 429 with Retry-After if the key's rate or concurrency is used up.

        The rate is limited by a token bucket for a tenth of `requests_per_minute`, but at least one token.
        """
        now = self.clock()
        per_second = key.requests_per_minute / 60
        burst = max(1.0, key.requests_per_minute / 10)
        bucket = self._buckets.setdefault(key.name, _TokenBucket(burst, now))
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.updated) * per_second)
        bucket.updated = now
        if key.concurrency and bucket.running >= key.concurrency:
            message = f"this key has {bucket.running} requests in flight, which is its limit"
            raise ApiError(429, message, code="concurrency_limit", retry_after_seconds=1)
        if per_second:
            if bucket.tokens < 1:
                message = f"this key is limited to {key.requests_per_minute:g} requests per minute"
                wait = (1 - bucket.tokens) / per_second
                raise ApiError(429, message, code="rate_limit", retry_after_seconds=wait)
            bucket.tokens -= 1
        bucket.running += 1

    def leave(self, key: Key) -> None:
        """Count the end of a request."""
        self._buckets[key.name].running -= 1
