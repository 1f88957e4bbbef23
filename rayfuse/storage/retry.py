"""Retries with exponential backoff and full jitter, for requests to object storage."""

import functools
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from rayfuse.config.base import UserError, first_line

RETRY_SECONDS = 300.0
"""How long one request is retried before the storage counts as unavailable."""

FIRST_BACKOFF_SECONDS = 0.1

MAX_BACKOFF_SECONDS = 20.0

CLIENT_PACKAGES = ("aiohttp", "botocore", "urllib3")
"""Packages below fsspec. Their errors come from the network or the store."""

CREDENTIALS_REMEDY = (
    "give this computer, and every node, credentials as for other AWS tools: a role, "
    "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)
LOGIN_REMEDY = "log in again, with `aws sso login`"

ACCESS_REMEDIES = {
    "NoCredentialsError": CREDENTIALS_REMEDY,
    "PartialCredentialsError": CREDENTIALS_REMEDY,
    "ProfileNotFound": "set AWS_PROFILE to a profile of ~/.aws/config, or unset it",
    "NoRegionError": "set AWS_REGION",
    "SSOTokenLoadError": LOGIN_REMEDY,
    "UnauthorizedSSOTokenError": LOGIN_REMEDY,
    "TokenRetrievalError": LOGIN_REMEDY,
}
"""By name, botocore's errors of missing settings: a retry cannot resolve them, but a user can."""

CREDENTIAL_SERVICE_ERRORS = ("CredentialRetrievalError",)
"""Errors of the service that gives credentials, which may answer later."""

FINAL_ERRORS = (
    *("FileNotFoundError", "FileExistsError", "PermissionError", "IsADirectoryError"),
    *("NotADirectoryError", "ParamValidationError", "UnknownServiceError"),
    *ACCESS_REMEDIES,
)
"""Names of errors that a retry cannot resolve."""


class Counter:
    """A count that several threads increment."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()

    def increment(self) -> None:
        """Add one."""
        with self.lock:
            self.count += 1


NUM_RETRIES = Counter()
"""Requests of this process that failed and were retried."""


class StorageUnavailableError(OSError):
    """The storage has not answered for as long as requests are retried."""


class AccessSettingsError(UserError):
    """A setting by which the storage is accessed is missing or wrong."""


@runtime_checkable
class Connection(Protocol):
    """A store that retries its requests."""

    @property
    def root(self) -> str:
        """The URI that its names are below."""
        ...

    @property
    def retry_seconds(self) -> float:
        """How long one request is retried."""
        ...

    def reconnect(self) -> None:
        """Drop the connection and its credentials."""
        ...


Store = TypeVar("Store", bound=Connection)
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def retry_transient(
    method: Callable[Concatenate[Store, Given], Answer],
) -> Callable[Concatenate[Store, Given], Answer]:
    """Retry a store's request on transient errors: 5xx, resets, timeouts, truncated answers.

    The backoff grows to `MAX_BACKOFF_SECONDS`. Each pause is drawn uniformly between 0 and that
    bound ("full jitter"), so that a thousand workers do not return at once. Each retry opens a new
    connection and fetches the credentials again, since stores report expired credentials in
    several ways.
    """

    @functools.wraps(method)
    def request(store: Store, /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        began, tries = time.monotonic(), 0
        has_renewed = False
        while True:
            try:
                return method(store, *args, **kwargs)
            except Exception as error:  # the clients' errors share no class; others are raised
                if _has_expired(error) and not has_renewed:
                    has_renewed = True
                    store.reconnect()
                    continue
                if not is_transient(error):
                    check_access(error, store.root)
                    raise
                waited = time.monotonic() - began
                if waited >= store.retry_seconds:
                    raise _unavailable(store, waited, error) from error
                bound = min(FIRST_BACKOFF_SECONDS * 2**tries, MAX_BACKOFF_SECONDS)
                time.sleep(min(random.uniform(0, bound), store.retry_seconds - waited))
                tries += 1
                NUM_RETRIES.increment()
                store.reconnect()

    return request


def is_transient(error: BaseException) -> bool:
    """Check whether the same request may succeed later."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & set(FINAL_ERRORS):
        return False
    is_from_client = type(error).__module__.partition(".")[0] in CLIENT_PACKAGES
    return is_from_client or isinstance(error, OSError | TimeoutError)


def check_access(error: Exception, uri: str) -> None:
    """Raise botocore's error of a missing setting with its remedy; accept any other error.

    Raises:
        AccessSettingsError: A setting by which `uri` is accessed is missing or wrong.
    """
    for kind in type(error).__mro__:
        if kind.__name__ in ACCESS_REMEDIES:
            remedy = ACCESS_REMEDIES[kind.__name__]
            raise AccessSettingsError(
                f"{uri} cannot be accessed ({first_line(error)}); {remedy}"
            ) from error


def _has_expired(error: BaseException) -> bool:
    response: Any = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response["Error"].get("Code") == "ExpiredToken"


def _unavailable(store: Connection, waited: float, error: Exception) -> StorageUnavailableError:
    remedy = CREDENTIALS_REMEDY if type(error).__name__ in CREDENTIAL_SERVICE_ERRORS else ""
    return StorageUnavailableError(
        f"storage {store.root} has failed for {waited:.0f} s, the last error is "
        f"{type(error).__name__}: {error}; committed work is kept: run the same command again "
        f"once the storage is back{remedy and f', or {remedy}'}"
    )
