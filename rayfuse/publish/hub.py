"""One commit of a model on a hub, and a remedy for each way in which a hub refuses it."""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import huggingface_hub  # imports its parts when they are used

from rayfuse.config.base import UserError, first_line, user_error_from

WEIGHT_NAMES = re.compile(r"model[^/]*\.safetensors(\.index\.json)?")
"""Files of an earlier push that would be loaded together with those of this one."""

ADAPTER_FILE = "adapter_config.json"

REMEDIES = {
    401: "the hub refuses the token: renew it, and set it as HF_TOKEN or run `hf auth login`",
    403: "the token has no right to write there: use one with the role write that covers this name",
    404: "the user or organization does not exist, or the token cannot see it: check the name",
    409: "another commit was made at the same time: run the same command again",
    413: "a file is larger than the hub takes: save the model in smaller files",
}
"""By HTTP status."""

NO_CONNECTION = ("TransportError", "ConnectionError", "TimeoutError")
"""Names of the errors of clients, httpx's first, that had no answer from the hub."""

CONNECTION_REMEDY = (
    "check the connection to {endpoint} (HF_ENDPOINT), and run the same command again: files that "
    "are uploaded already are not sent again"
)

OTHER_REMEDY = (
    "if that persists, update huggingface_hub, or upload the model's folder by `hf upload`"
)


def check_name(repository: str) -> None:
    """Check that a model's name on the hub is USER/NAME.

    Raises:
        UserError: It is not.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repository)
        fault = "" if repository.count("/") == 1 else "it has no user"
    except ValueError as error:
        fault = first_line(error)
    if fault:
        raise UserError(
            f"the name on the hub is {repository!r} ({fault}); give USER/NAME, of letters, digits, "
            "'-', '_' and '.'"
        )


def open_hub() -> huggingface_hub.HfApi:
    """Open the hub of HF_ENDPOINT with the user's token.

    Raises:
        UserError: There is no token.
    """
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError(
            "there is no token for the hub; make one with the role write in the hub's settings, "
            "and set it as HF_TOKEN or run `hf auth login`"
        )
    return huggingface_hub.HfApi(token=token)


def check_access(hub: huggingface_hub.HfApi, repository: str, *, is_public: bool) -> None:
    """Check that a model can be uploaded under a name.

    Raises:
        UserError: The token is refused, the name belongs to others, or the model exists with
            another visibility.
    """
    user = repository.partition("/")[0]
    with naming_repository(repository, hub.endpoint):
        account = hub.whoami()
        owners = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    if user.lower() not in [owner.lower() for owner in owners]:
        raise UserError(
            f"the name on the hub is {repository!r}, but the token belongs to {account['name']!r}; "
            f"its models can be named under {', '.join(owners)}"
        )
    with naming_repository(repository, hub.endpoint):
        try:
            is_private = hub.model_info(repository).private
        except huggingface_hub.errors.RepositoryNotFoundError:
            return  # it will be created
    if bool(is_private) == is_public:
        found, remedy = ("private", "omit --public") if is_private else ("public", "add --public")
        raise UserError(
            f"{repository} exists and is {found}; {remedy}, or change it in the hub's settings"
        )


def list_present(hub: huggingface_hub.HfApi, repository: str) -> list[str]:
    """List the files of a repository on the hub; none if it does not exist yet.

    Raises:
        UserError: The hub refuses, or is unavailable.
    """
    with naming_repository(repository, hub.endpoint):
        try:
            return hub.list_repo_files(repository)
        except huggingface_hub.errors.RepositoryNotFoundError:
            return []


def list_removed(present: Sequence[str], names: Collection[str], repository: str) -> list[str]:
    """List the weights of an earlier push that a push removes.

    Args:
        present: The files of the repository.
        names: The files that are pushed.
        repository: USER/NAME.

    Raises:
        UserError: The repository has an adapter, which would be applied to the model.
    """
    if ADAPTER_FILE in present:
        raise UserError(
            f"{repository} has {ADAPTER_FILE}, so that transformers would apply its adapter to the "
            f"model; give another name, or remove {ADAPTER_FILE} there first"
        )
    gguf = f"{repository.partition('/')[2]}.gguf"
    return [
        name
        for name in present
        if name not in names and (name == gguf or WEIGHT_NAMES.fullmatch(name))
    ]


def upload_model(
    hub: huggingface_hub.HfApi,
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    removed: Sequence[str],
    is_public: bool,
    message: str,
) -> str:
    """Upload files as one commit, and return its address; the repository is created if needed.

    Args:
        hub: The hub.
        repository: USER/NAME.
        files: Local files, or their content, by their names in the repository.
        removed: Files of the repository that the same commit removes.
        is_public: Whether a repository that is created is public.
        message: The commit's message.

    Raises:
        UserError: The hub refuses, or is unavailable.
    """
    with naming_repository(repository, hub.endpoint):
        hub.create_repo(repository, private=not is_public, exist_ok=True)
        operations = [
            *(huggingface_hub.CommitOperationDelete(name) for name in removed),
            *(
                huggingface_hub.CommitOperationAdd(
                    name, content if isinstance(content, bytes) else str(content)
                )
                for name, content in sorted(files.items())
            ),
        ]
        commit = hub.create_commit(repository, operations, commit_message=message)
    return str(commit.commit_url)


def naming_repository(repository: str, endpoint: str) -> AbstractContextManager[None]:
    """Turn any error of the hub's client into a `UserError` with the name and a remedy."""
    return user_error_from(
        lambda error: UserError(
            f"{repository} cannot be uploaded to {endpoint} "
            f"({first_line(error.__cause__ or error)}); "
            f"{_find_remedy(error, endpoint)}"
        )
    )


def _find_remedy(error: BaseException, endpoint: str) -> str:
    """Find the remedy of an error of the hub's client, by its status or that of its cause."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in REMEDIES:
            return REMEDIES[status]
        if isinstance(cause, huggingface_hub.errors.OfflineModeIsEnabled):
            return "unset HF_HUB_OFFLINE"
        if any(kind.__name__ in NO_CONNECTION for kind in type(cause).__mro__):
            return CONNECTION_REMEDY.format(endpoint=endpoint)
        cause = cause.__cause__ or cause.__context__
    return OTHER_REMEDY
