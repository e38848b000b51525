"""Keys of callers: made, hashed, and found in a request's headers."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Mapping

_KEY_BYTES = 32
_KEY_START = "sk-"


def presented_key(headers: Mapping[str, str]) -> str | None:
    """Return the key that a request presents: as a bearer, or as the password of HTTP Basic."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def hash_key(key: str) -> str:
    """Return the hash of a key, as it stands in `sdtpu_http_keys`. A key is random, so no salt is needed."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def new_key() -> str:
    """Return a new random key."""
    return _KEY_START + secrets.token_urlsafe(_KEY_BYTES)
