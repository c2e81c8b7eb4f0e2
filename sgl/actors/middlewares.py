"""What happens around every request: its id, its key, and errors as JSON in the route's shape."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware

from sgl.actors.access import Access, Level
from sgl.actors.endpoint import Handler
from sgl.actors.request_log import RequestLog
from sgl.errors import (
    EngineError,
    NotFoundError,
    RequestError,
    RequestTooLargeError,
    UnauthorizedError,
)
from sgl.protocol.call import CLIENT_ABORT_STATUS
from sgl.protocol.native_reply import native_error
from sgl.protocol.openai import error_body, openai_error

logger = logging.getLogger(__name__)

MAX_ID_CHARS = 128
RETRY_AFTER_S = 1
_HTTP_KINDS = {error.status: error.kind for error in (NotFoundError, RequestTooLargeError)}
REQUEST_ID = web.RequestKey("request_id", str)
_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "*",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Request-Id, *",
    "Access-Control-Expose-Headers": "X-Request-Id",
}


def json_response(
    payload: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def error_response(request: web.Request, error: RequestError) -> web.Response:
    """`error` in the shape clients of this path expect."""
    shape = openai_error if _is_openai(request) else native_error
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else None
    return json_response(shape(error), error.status, headers)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """To every response, streams included: they cannot get headers any later."""
    response.headers.update(_CORS)
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")


@web.middleware
async def name_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: a name for the request, the client's own where it is fit to be logged."""
    given = request.headers.get("X-Request-Id", "")
    is_fit = 0 < len(given) <= MAX_ID_CHARS and given.isascii() and given.isprintable()
    request[REQUEST_ID] = given if is_fit else uuid.uuid4().hex
    return await handler(request)


def log_requests(log: RequestLog) -> Middleware:
    """One line for each request when it ends, while `log` is on."""

    @web.middleware
    async def write(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        response = await handler(request)
        if log.is_on:
            logger.info(
                "%s %.200s %d, %.3f s, request %s",
                request.method,
                request.path.encode("unicode_escape").decode(),
                response.status,
                time.monotonic() - started,
                request[REQUEST_ID],
            )
        return response

    return write


def check_access(access: Access, levels: Mapping[web.AbstractResource, Level]) -> Middleware:
    """Before anything of the body is read: may this caller use this route?"""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "OPTIONS":
            return web.Response(status=204)
        resource = request.match_info.route.resource
        level = Level.API if resource is None else levels[resource]
        if access.allows(request, level):
            return await handler(request)
        if level is Level.ADMIN and access.allows(request, Level.API):
            return forbidden(request)
        if _is_openai(request):
            return error_response(request, UnauthorizedError("the API key is missing or wrong"))
        return json_response({"error": "Unauthorized"}, 401)

    return check


def forbidden(request: web.Request) -> web.Response:
    message = (
        "this needs the admin key: start the server with --admin-api-key and send that key as "
        "a bearer token, or call a server that listens on 127.0.0.1"
    )
    return json_response({"error": {"message": message}}, 403)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(request, error)
    except web.HTTPException as error:
        return _http_error(request, error)
    except ConnectionResetError:  # nobody is there to read this; aiohttp would log a traceback
        return web.Response(status=CLIENT_ABORT_STATUS)
    except Exception:  # the last line: whatever went wrong, the client gets JSON and no traceback
        logger.exception("request %s failed", request[REQUEST_ID])
        return error_response(
            request, EngineError(f"internal error; the log has more under {request[REQUEST_ID]}")
        )


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """404, 405, 408, 413: what aiohttp refuses itself."""
    message = f"{HTTPStatus(error.status).phrase}: {request.method} {request.path:.200}"
    allow = error.headers.get("Allow")
    if allow:
        message += f": it takes {allow}"
    if meant := _meant_path(request):
        message += f". The path is {meant}: does the base URL end in /v1, once?"
    kind = _HTTP_KINDS.get(error.status, RequestError.kind)
    shown = (
        error_body(message, kind, code=str(error.status))
        if _is_openai(request)
        else {"error": {"message": message}}
    )
    return json_response(shown, error.status, {"Allow": allow} if allow else None)


def _meant_path(request: web.Request) -> str | None:
    """The route that a base URL without /v1, or with two of them, has missed."""
    names = [name for name in request.path.split("/") if name not in ("", "v1")]
    meant = "/".join(["", "v1", *names])
    known = {resource.canonical for resource in request.app.router.resources()}
    return meant if meant in known and meant != request.path else None


def _is_openai(request: web.Request) -> bool:
    return request.path.startswith("/v1/")
