"""Which errors of requests are retried, and what is advised at the end."""

import botocore.exceptions
import pytest

from rayfuse.storage.retry import StorageUnavailableError, retry_transient


class Account:
    """Fails as often as it is told, as a service of credentials under load does."""

    root = "s3://bucket/run"
    retry_seconds = 1.0

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def reconnect(self) -> None:
        """Do nothing."""

    @retry_transient
    def ask(self) -> str:
        """Raise what botocore raises when the service does not answer."""
        if self.failures:
            self.failures -= 1
            raise botocore.exceptions.CredentialRetrievalError(provider="iam", error_msg="429")
        return "an answer"


def test_a_service_of_credentials_that_is_busy_is_asked_again():
    assert Account(2).ask() == "an answer"
    with pytest.raises(StorageUnavailableError, match=r"429.*or give this computer, and every"):
        Account(10**6).ask()
