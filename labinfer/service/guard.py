"""Who may come in: every path but the public ones needs an API key, and a ``Host`` that is ours.

A pure ASGI layer around everything else, so that no route can be forgotten: what it does not let in by name stays out.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import Any

from labinfer.service.call import Receive, Reply, Scope, Send
from labinfer.service.errors import ApiError
from labinfer.service.operations.page import page_reply
from labinfer.service.options import ServiceOptions
from labinfer.service.wire import json_bytes

_log = logging.getLogger("labinfer.service.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:\d{1,5})?")

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """Lets requests through to ``app``. ``public`` are the paths that need no key.

    Gives each request an id (the client's own where it has one), and writes a line about it to the log, but for those
    of ``polled`` paths that were answered well.
    """

    def __init__(self, app: Any, options: ServiceOptions, public: Collection[str], polled: Collection[str]) -> None:
        self.app, self.hosts, self.public, self.polled = app, options.hosts, frozenset(public), frozenset(polled)
        self.keys = [sha256(key.encode()).digest() for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope["labinfer.request_id"] = request_id
        record = Answered(scope, send, request_id)
        try:
            self.check(scope, headers)
            await self.app(scope, receive, record.send)
        except ApiError as error:
            await refuse(record, error, headers)
        except Exception:
            _log.exception("request %s failed", request_id, extra={"request_id": request_id})
            await refuse(
                record, ApiError(500, f"the server failed; its log tells of {request_id}", final=True), headers
            )
        finally:
            if scope["path"] not in self.polled or record.status != 200:
                record.log()

    def check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        """Raise for a request that may not come in."""
        host = _HOST.fullmatch(headers.get(b"host", ""))
        if host is None or (self.hosts and host["name"].strip("[]").lower() not in self.hosts):
            raise ApiError(421, "this host name is not served here")
        path = scope["path"]
        if path in self.public and scope["raw_path"] == path.encode():
            return
        key = self.known(headers)
        if key is None:
            raise ApiError(401, "give the server's API key: Authorization: Bearer KEY", code="invalid_api_key")
        scope["labinfer.salt"] = key.hex()[:16]

    def known(self, headers: dict[bytes, str]) -> bytes | None:
        """The digest of the key in ``headers``, if it is one of ours; takes equally long whichever it is."""
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        given = given.strip() if kind.lower() == "bearer" else headers.get(b"x-api-key", "")
        digest = sha256(given.encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, key) for key in self.keys]
        return digest if any(matches) else None


class Answered:
    """What was answered to a request, for the log; adds the headers that every answer has."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.scope, self.inner, self.request_id = scope, send, request_id
        self.status, self.began = 0, time.monotonic()

    async def send(self, message: Any) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = (b"x-request-id", self.request_id.encode())
            message["headers"] = [*message["headers"], own, *SECURITY_HEADERS]
        await self.inner(message)

    def log(self) -> None:
        """Write the line."""
        status = 499 if self.scope.get("labinfer.gone") else self.status
        seconds = time.monotonic() - self.began
        path = self.scope["path"][:200]
        details = {
            "request_id": self.request_id, "method": self.scope["method"], "path": path, "status": status,
            "seconds": round(seconds, 4),
        }  # fmt: skip
        _log.info("%s %r %d %.3f s", self.scope["method"], path, status, seconds, extra=details)


async def refuse(record: Answered, error: ApiError, asked: Mapping[bytes, str]) -> None:
    """Answer with an error, unless an answer has begun: its end is missing then, which clients notice.

    A browser without a key gets the page, which has no secret in it and asks for one.
    """
    if record.status:
        return
    reply = Reply(json_bytes(error.body(record.scope["path"])))
    if error.status == 401 and record.scope["path"] == "/" and "text/html" in asked.get(b"accept", ""):
        reply = page_reply()
    body, headers = reply.body, {"content-type": reply.content_type, **reply.headers, **error.headers()}
    headers["content-length"] = str(len(body))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await record.send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await record.send({"type": "http.response.body", "body": body})
