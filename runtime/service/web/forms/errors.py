"""Errors of the API in the form that clients of OpenAI's API know, each with a stable code."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from wanforge.errors import WanforgeError
from wanforge.runtime.service.results.base import StorageError
from wanforge.runtime.service.store.base import StoreError, TurnedAwayError

STATUS = {
    "queue_full": 429,
    "too_many_queued": 429,
    "idempotency_conflict": 409,
    "batch_empty": 400,
    "bad_text": 400,
    "object_gone": 409,
    "job_active": 409,
    "unknown_job": 404,
}
"""The HTTP status of each code with which the store turns a client away."""
BUSY_SECONDS = 5
"""After how many seconds to try again when the store is out of order."""
CODE = "wanforge.code"
"""Where the scope of a request has the code of the error that it was answered with."""
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error",
         410: "not_found_error", 429: "rate_limit_error"}  # fmt: skip
"""The type of an error by its status; others are wrong requests, or errors of the server."""


class ErrorDetails(BaseModel):
    """What is wrong.

    Attributes:
        param: The field that is wrong.
        code: A stable word for programs; docs/serving.md lists them.
    """

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetails


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def response(self) -> Response:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return error_response(self.status, self.code, str(self), param=self.param, headers=headers)


class ErrorResponse(JSONResponse):
    """An answer that leaves the code of its error in the scope of the request, for whoever counts answers."""

    def __init__(self, body: ErrorBody, status: int, headers: Mapping[str, str] | None) -> None:
        super().__init__(body.model_dump(), status, headers)
        self.code = body.error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[CODE] = self.code
        await super().__call__(scope, receive, send)


def error_response(
    status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    details = ErrorDetails(message=message, type=kind, param=param, code=code)
    return ErrorResponse(ErrorBody(error=details), status, headers)


def absent(what: str) -> ApiError:
    """The error for something that there is not."""
    return ApiError(404, "not_found", f"there is no {what}")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """The error for a field with a wrong value."""
    return ApiError(400, code, message, param)


@contextmanager
def about(param: str) -> Iterator[None]:
    """Let what the model's rules say of a value be an error of a field."""
    try:
        yield
    except WanforgeError as error:
        raise invalid(error.field or param, str(error)) from None


def install(app: FastAPI) -> None:
    """Answer every failure in the same form."""

    @app.exception_handler(ApiError)
    async def of_the_api(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(TurnedAwayError)
    async def turned_away(request: Request, error: TurnedAwayError) -> Response:
        return ApiError(STATUS[error.code], error.code, str(error), retry_after=error.retry_after).response()

    @app.exception_handler(StoreError)
    async def of_the_store(request: Request, error: StoreError) -> Response:
        return ApiError(503, error.code, str(error), retry_after=BUSY_SECONDS).response()

    @app.exception_handler(StorageError)
    async def of_the_storage(request: Request, error: StorageError) -> Response:
        if error.code == "object_gone":
            return ApiError(410, "expired", str(error)).response()
        return ApiError(503, error.code, str(error), retry_after=BUSY_SECONDS).response()

    @app.exception_handler(RequestValidationError)
    async def of_parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return validation_error(first).response()

    @app.exception_handler(ClientDisconnect)
    async def of_the_connection(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # which nobody reads, since the client has left

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 400: "invalid_body"}
        name = code.get(error.status_code, "invalid_request")
        headers = {"Allow": ", ".join(methods_at(request))} if error.status_code == 405 else error.headers
        return error_response(error.status_code, name, str(error.detail), headers=headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return error_response(500, "internal_error", "the server failed; the log of the server says why")


def methods_at(request: Request) -> list[str]:
    """The methods that the path of a request has in all of its routes; the framework only tells of the first."""
    routes = [route for route in request.app.state.routes if route.path_regex.match(request.url.path)]
    routes = [route for route in routes if route.path == request.url.path] or routes
    return sorted({method for route in routes for method in route.methods})


def validation_error(found: Any) -> ApiError:
    """What pydantic says of a field.

    Args:
        found: One of the errors of a ValidationError.
    """
    place = [str(part) for part in found["loc"] if part not in ("body", "query", "path", "header")]
    param = place[0] if place else None
    kind = found["type"]
    if kind == "extra_forbidden":
        return invalid(param, f"there is no field {param!r}", "unknown_field")
    if kind == "missing":
        return invalid(param, f"{param} is missing", "missing_field")
    if kind in ("json_invalid", "model_type"):
        return ApiError(400, "invalid_body", f"the body is no JSON object: {found['msg']}")
    return invalid(param, f"{param}: {found['msg']}")
