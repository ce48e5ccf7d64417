"""Errors of a request, in the format that OpenAI's clients expect."""
from typing import Dict, Optional

from research.telechat.common.errors import UserError
from research.telechat.common.files import JsonObject

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(UserError):
    """A failed request: HTTP status, message, and the other fields of OpenAI's error format.

    `param`: the invalid key of the body; `code`: machine-readable code; `retry_after`: seconds after which the same
    request may succeed.
    """

    def __init__(self, status: int, message: str, param: Optional[str] = None, code: Optional[str] = None,
                 retry_after: Optional[float] = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> JsonObject:
        """{"error": {...}}."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Dict[str, str]:
        """Retry-After in whole seconds, WWW-Authenticate, or none."""
        if self.retry_after is not None:
            return {"retry-after": str(max(1, round(self.retry_after)))}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def too_long(found: int, asked: int, context: int) -> ApiError:
    """The error for a prompt of `found` tokens and an answer of up to `asked`, together more than the context."""
    return ApiError(400, f"the prompt has {found} tokens and the answer up to {asked}, but the model's context is "
                         f"{context} tokens: shorten the prompt, or ask for a shorter answer", "messages",
                    "context_length_exceeded")
