"""What can go wrong on the way to the hub, each in our words with the next step."""

import contextlib
import errno
import os
from collections.abc import Iterator

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from common.errors import (
    ConfigError,
    HubError,
    HubGated,
    HubNotFound,
    HubOffline,
    HubRateLimited,
    HubUnauthorized,
    HubUnreachable,
    InvalidValue,
    MlxspecError,
    NoSpace,
)

DEFAULT_ENDPOINT = "https://huggingface.co"
RETRY_AFTER_S = 60.0


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or huggingface.co. Raises `ConfigError` for what is no address."""
    address = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"HF_ENDPOINT is {address[:200]!r}; it must be an address such as {DEFAULT_ENDPOINT}")
    return address


@contextlib.contextmanager
def told(model_id: str, revision: str | None = None) -> Iterator[None]:
    """Raises ours for every error of the hub library inside."""
    try:
        yield
    except MlxspecError:
        raise
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, httpx2.HTTPError, OSError) as error:
        raise in_our_words(error, model_id, revision) from error


def in_our_words(error: Exception, model_id: str, revision: str | None = None) -> MlxspecError:
    """The error of ours that `error` means."""
    where = f"{model_id}@{revision}" if revision else model_id
    match error:
        case OfflineModeIsEnabled():
            return HubOffline(
                f"{where} is not here and HF_HUB_OFFLINE forbids to fetch it; unset that, or take one of `mlxspec list`"
            )
        case GatedRepoError():
            page = f"{endpoint()}/{model_id}"
            return HubGated(
                f"{model_id} is gated: accept its terms at {page}, then set HF_TOKEN to that account's token"
            )
        case RevisionNotFoundError():
            return HubNotFound(f"{model_id} has no revision {revision or 'main'!r} on {endpoint()}")
        case RepositoryNotFoundError():
            return _missing(model_id)
        case EntryNotFoundError():
            return HubNotFound(f"a file of {where} is missing on {endpoint()}: {_first_line(error)}")
        case HFValidationError():
            return InvalidValue(f"{model_id[:128]!r} is no model id: {_first_line(error)}", param="id")
        case HfHubHTTPError():
            return _by_status(error, model_id)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(f"the disk is full: {error.filename or 'MLXSPEC_HOME'}; free some, what came is kept")
        case httpx2.TimeoutException():
            return HubUnreachable(f"{endpoint()} did not answer in time; try again, what came is kept")
        case httpx2.HTTPError():
            return HubUnreachable(
                f"cannot reach {endpoint()} ({_first_line(error)}); check the network, then try again"
            )
        case OSError() if error.errno is not None:
            return HubError(f"cannot write {error.filename or where}: {error.strerror}")
        case _:
            return HubUnreachable(f"{where} did not arrive whole ({_first_line(error)}); try again, what came is kept")


def _missing(model_id: str) -> MlxspecError:
    """The hub says "unauthorized" of models that do not exist and of private ones alike."""
    hint = "check the spelling with `mlxspec search`; for a private model set HF_TOKEN"
    return HubNotFound(f"{model_id} is not on {endpoint()}; {hint}")


def _by_status(error: HfHubHTTPError, model_id: str) -> MlxspecError:
    status = error.response.status_code if error.response is not None else 0
    if status == 429:
        pause_s = _pause_s(error)
        return HubRateLimited(f"{endpoint()} wants a pause: try again in {pause_s:g} s", retry_after_s=pause_s)
    if status == 401:
        return HubUnauthorized(f"{endpoint()} does not take the token; check HF_TOKEN or `hf auth login`")
    if status == 403:
        return HubUnauthorized(f"{endpoint()} does not let this token read {model_id}; check its scopes")
    if status == 404:
        return _missing(model_id)
    if status >= 500:
        return HubUnreachable(f"{endpoint()} has trouble of its own (HTTP {status}); try again later")
    return HubError(f"{endpoint()} answered with HTTP {status}: {_first_line(error)}")


def _pause_s(error: HfHubHTTPError) -> float:
    text = error.response.headers.get("Retry-After", "") if error.response is not None else ""
    return float(text) if text.isdigit() else RETRY_AFTER_S


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
