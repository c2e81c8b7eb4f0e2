"""Who may use which route. Every route declares its level; this is the whole rule:

              no key set           --api-key set                --admin-api-key set
    PUBLIC    everybody            everybody                    everybody
    API       everybody            API key, or the admin key    as before it was set
    ADMIN     local callers of     local listeners: API key;    admin key
              a local listener     others: nobody

A listener is local if it is bound to a loopback address. Without a key, a caller counts as local
only if its Host and Origin headers name a loopback address too: a web page that some browser on
this machine shows must not reach the admin routes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from enum import Enum, auto
from urllib.parse import urlsplit

from aiohttp import web

API_KEY, ADMIN_KEY = "api_key", "admin_key"


class Level(Enum):
    PUBLIC = auto()
    API = auto()
    ADMIN = auto()


class Access:
    """The rule above, for one server's keys and address."""

    def __init__(self, api_key: str | None, admin_api_key: str | None, host: str) -> None:
        self._api_digest = _digest(api_key)
        self._admin_digest = _digest(admin_api_key)
        self._is_local = is_loopback(host)

    def allows(self, request: web.Request, level: Level) -> bool:
        match level:
            case Level.PUBLIC:
                return True
            case Level.API:
                return self._api_digest is None or self._has_any_key(request)
            case Level.ADMIN:
                return self._allows_admin(request)

    def keys_of(self, level: Level) -> list[str]:
        """What the keys are called that open `level`; none: nobody needs one."""
        has_api, has_admin = self._api_digest is not None, self._admin_digest is not None
        match level:
            case Level.PUBLIC:
                return []
            case Level.API:
                return [API_KEY, *([ADMIN_KEY] if has_admin else [])] if has_api else []
            case Level.ADMIN:
                return [ADMIN_KEY] if has_admin else [API_KEY] if has_api else []

    def _allows_admin(self, request: web.Request) -> bool:
        if self._admin_digest is not None:
            return _matches(request, self._admin_digest)
        if not self._is_local:
            return False
        if self._api_digest is not None:
            return _matches(request, self._api_digest)
        return _names_loopback(request)

    def _has_any_key(self, request: web.Request) -> bool:
        known = (self._api_digest, self._admin_digest)
        matches = [_matches(request, digest) for digest in known if digest is not None]
        return any(matches)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str | None) -> bytes | None:
    return None if key is None else hashlib.sha256(key.encode()).digest()


def _matches(request: web.Request, digest: bytes) -> bool:
    """Compares digests, in a time that does not depend on how much of the key is right."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    return hmac.compare_digest(given, digest) and scheme.lower() == "bearer"


def _names_loopback(request: web.Request) -> bool:
    origin = request.headers.get("Origin")
    names = [urlsplit(f"//{request.host}").hostname]
    if origin is not None:
        names.append(urlsplit(origin).hostname)
    return all(name is not None and is_loopback(name) for name in names)
