"""Refusals in the form of OpenAI's API, or as `application/problem+json`, as the door sends them."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from sdtpu_worker.http.exchange import send
from sdtpu_worker.web.problems import Refusal, problem_answer

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def as_problem(refusal: Refusal) -> Response:
    """Return a refusal as RFC 9457 has it."""
    return send(problem_answer(refusal))


def as_openai_error(refusal: Refusal) -> Response:
    """Return a refusal as OpenAI's clients read it."""
    return JSONResponse({"error": openai_error(refusal)}, refusal.status, headers=refusal.headers)


def openai_error(refusal: Refusal) -> dict[str, str | None]:
    """Return the fields of OpenAI's error object."""
    default = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {
        "message": refusal.detail,
        "type": _OPENAI_TYPES.get(refusal.status, default),
        "param": refusal.param,
        "code": refusal.code,
    }
