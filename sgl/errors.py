"""Every exception this package raises on purpose.

SglError
  RequestError            the client can mend it     -> its HTTP status; the server lives on
    InvalidRequestError       a field is wrong                                 400
    PromptTooLongError        does not fit the context or the KV cache         400
    UnauthorizedError         the API key is missing or wrong                  401
    NotFoundError             there is no model, file or batch of this name    404
    RequestTooLargeError      the body is over the size limit                  413
    AbortedError              somebody aborted it by its rid                   499
    OverloadedError           the waiting queue is full, or we are stopping    503
    EngineError               the request failed inside the engine             500
  ProgramError            of the language
    UnknownVariableError      a program has no such variable; also a KeyError
    ProgramAbortedError       it was ended before it was done
    BackendError              what answers the program failed, or refused
  ConfigError             the operator can mend it   -> one paragraph on stderr, exit code 2
  ActorDiedError          we must mend it            -> traceback, the whole server stops
"""

from __future__ import annotations


class SglError(Exception):
    """Base of all errors of this package."""


class RequestError(SglError):
    """One request is refused or failed; `status` is the HTTP status its sender gets."""

    status = 400
    kind = "BadRequestError"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequestError(RequestError):
    """A field of the request has a value that cannot be served."""


class PromptTooLongError(RequestError):
    """The prompt, or prompt and answer together, can never fit."""

    code: str | None = "context_length_exceeded"


class UnauthorizedError(RequestError):
    """The request carries no valid API key."""

    status = 401
    kind = "AuthenticationError"
    code: str | None = "invalid_api_key"


class NotFoundError(RequestError):
    """What the request names does not exist."""

    status = 404
    kind = "NotFoundError"


class ModelNotFoundError(NotFoundError):
    """The server has no model of this name."""

    code: str | None = "model_not_found"


class RequestTooLargeError(RequestError):
    """The body is larger than the server reads."""

    status = 413
    kind = "RequestTooLargeError"


class AbortedError(RequestError):
    """The request was aborted by its name before it had an answer."""

    status = 499
    kind = "AbortError"


class OverloadedError(RequestError):
    """The server takes no more requests at the moment; the client may try again."""

    status = 503
    kind = "ServiceUnavailableError"
    code: str | None = "overloaded"


class EngineError(RequestError):
    """The engine could not finish this request; other requests are not affected."""

    status = 500
    kind = "InternalServerError"


class ConfigError(SglError):
    """The server cannot start as asked; the message says what, why and what to type."""


class ActorDiedError(SglError):
    """A process of the engine ended unexpectedly."""


class ProgramError(SglError):
    """A program of the language cannot go on."""


class UnknownVariableError(ProgramError, KeyError):
    """A program has no variable of this name."""

    def __str__(self) -> str:  # KeyError shows a repr
        return str(self.args[0])


class ProgramAbortedError(ProgramError):
    """A program was ended before it had done everything."""


class BackendError(ProgramError, RuntimeError):
    """What answers a program failed, or refused a request."""
