"""What the server answers when it does not do what was asked, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

UNKNOWN = "unknown"  # pydantic's kind of error for a field that there is not
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """A request that is refused, or that failed.

    Args:
        status: Of HTTP.
        message: What was expected, what came, how to mend it.
        param: The field of the request that is wrong.
        code: A word for programs.
        headers: More headers of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def refused(error: ValidationError) -> APIError:
    """What is wrong with a request, from what pydantic found first."""
    found = error.errors(include_url=False, include_input=False)
    first, path = found[0], [str(part) for part in found[0]["loc"]]
    if first["type"] == "json_invalid":
        return APIError(400, f"body: expected JSON: {first['msg']}", code="invalid_json")
    if first["type"] == UNKNOWN:
        path.append(str(first["ctx"]["name"]))
        message = f"{'.'.join(path)}: this server does not know it; leave it out"
        return APIError(400, message, param=path[0], code="unknown_parameter")
    param = path[0] if path else None
    # Of a field that may have several types, each says why it is none of them.
    whys = [other for other in found if other["loc"][:1] == first["loc"][:1]]
    where = ".".join(path) if len(whys) == 1 else param
    message = "; ".join(dict.fromkeys(str(why["msg"]) for why in whys))
    return APIError(400, f"{where or 'body'}: {message[:300]}", param=param, code="invalid_value")
