"""The error of an API: what is wrong, with which parameter, and how each API says so."""

from typing import Any


class ApiError(Exception):
    """A request that is not answered. `param` names the parameter that is wrong, and `code` is for programs.

    `retry_s` is when the same request may be tried again, in whole seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_s = retry_s

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        headers = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        return headers | {"WWW-Authenticate": "Bearer"} if self.status == 401 else headers

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's form."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def ollama(self) -> dict[str, Any]:
        """The body in Ollama's form."""
        return {"error": self.message}


def unsupported(name: str, why: str) -> ApiError:
    """Make the error for a parameter that this server cannot obey."""
    return ApiError(f"{name} is not supported: {why}", param=name, code="unsupported_parameter")
