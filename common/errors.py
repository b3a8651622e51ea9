"""One tree of errors for every process. Each has a `code` that travels on the wire and an HTTP status.

A message gives the value, the limit and what to do.
"""


class MlxspecError(Exception):
    """Base of all our errors.

    `param` names the request field at fault, if one is; `retry_after_s` is for errors that pass by themselves.
    """

    code = "internal_error"
    http_status = 500
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InternalError(MlxspecError):
    """A bug or a broken machine on our side."""


class ConfigError(MlxspecError):
    """The configuration cannot be used."""

    code = "invalid_config"


class WireError(MlxspecError):
    """A frame on a socket is not one of our messages."""

    code = "protocol_error"


class InvalidRequest(MlxspecError):
    """The request can never succeed as it is."""

    code = "invalid_request"
    http_status = 400


class InvalidValue(InvalidRequest):
    """A field has the right shape and an impossible value."""

    code = "invalid_value"
    http_status = 422


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus answer do not fit the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    """The body is over the size limit."""

    code = "request_too_large"
    http_status = 413


class UnsupportedMediaType(InvalidRequest):
    """The body is not JSON."""

    code = "unsupported_media_type"
    http_status = 415


class RequestTimeout(InvalidRequest):
    """The client took too long to send its request."""

    code = "request_timeout"
    http_status = 408


class Unauthorized(MlxspecError):
    """No key, or a wrong one."""

    code = "invalid_api_key"
    http_status = 401


class Forbidden(MlxspecError):
    """The request may not be made from there."""

    code = "forbidden"
    http_status = 403


class NotFound(MlxspecError):
    """No such route or thing."""

    code = "not_found"
    http_status = 404


class ModelNotFound(NotFound):
    """No model of that name is known."""

    code = "model_not_found"


class MethodNotAllowed(MlxspecError):
    """The route exists, but not for this method."""

    code = "method_not_allowed"
    http_status = 405


class Conflict(MlxspecError):
    """The thing is in a state that forbids it."""

    code = "conflict"
    http_status = 409


class Overloaded(MlxspecError):
    """A queue is full; try again."""

    code = "overloaded"
    http_status = 429
    retryable = True


class Cancelled(MlxspecError):
    """The client went away."""

    code = "cancelled"
    http_status = 499


class ModelUnavailable(MlxspecError):
    """The model cannot answer now: it failed to load, or its worker died."""

    code = "model_unavailable"
    http_status = 503
    retryable = True


class PoisonRequest(MlxspecError):
    """The request was running each time its worker died; it is not tried again."""

    code = "poison_request"


class HubError(MlxspecError):
    """Hugging Face, or the way there, failed; each reason that a person can mend has a kind of its own."""

    code = "hub_error"
    http_status = 502


class HubNotFound(NotFound):
    """The hub has no such model, revision or file."""

    code = "hub_model_not_found"


class HubGated(Forbidden):
    """The model wants its licence accepted by an account, whose token must be given."""

    code = "hub_gated"


class HubUnauthorized(Forbidden):
    """The hub does not take the token."""

    code = "hub_unauthorized"


class HubRateLimited(HubError):
    """The hub wants a pause."""

    code = "hub_rate_limited"
    http_status = 429
    retryable = True


class HubUnreachable(HubError):
    """No answer from the hub."""

    code = "hub_unreachable"
    http_status = 503
    retryable = True


class HubOffline(HubError):
    """HF_HUB_OFFLINE forbids to ask."""

    code = "hub_offline"
    http_status = 409


class NoSpace(MlxspecError):
    """The disk is too full."""

    code = "no_space"
    http_status = 507


class DeadlineExceeded(MlxspecError):
    """The request took longer than it was allowed to."""

    code = "deadline_exceeded"
    http_status = 504
    retryable = True


def _tree(root: type[MlxspecError]) -> list[type[MlxspecError]]:
    return [root, *(leaf for branch in root.__subclasses__() for leaf in _tree(branch))]


_BY_CODE = {error.code: error for error in reversed(_tree(MlxspecError))} | {"internal_error": InternalError}


def from_code(code: str, message: str, param: str | None = None) -> MlxspecError:
    """The error that another process named by its code; an unknown code is an `InternalError`."""
    return _BY_CODE.get(code, InternalError)(message, param=param)
