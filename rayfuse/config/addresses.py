"""Find credentials in addresses and other text, and mask them."""

import re

ALLOWED_PARAMETERS = frozenset(
    {"version", "versionId", "generation", "revision", "download", "raw", "format"}
)
"""Parameters of an address whose values are no secret; any other may be one."""

CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
"""Azure's addresses have the container where others have the user: `abfs://box@account.net/run`."""

WEB_SCHEMES = ("http", "https", "ftp", "ftps")
"""Where `?` is never a wildcard, so that what follows is a secret even without a name."""

MASK = "***"

ADDRESS_PATTERN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>]+)")

PARAMETER_PATTERN = re.compile(
    r"(?<=[?&;#])[\w.-]*(?:sig|token|secret|pass|pwd|credential|key|auth|jwt)[\w.-]*=[^&;\s'\"]+"
    r"|(?:account|access|secret)_?-?key\s*=\s*[^&;\s'\"]+"
    r"|(?:sharedaccess|aws_secret)\w*\s*=\s*[^&;\s'\"]+",
    re.IGNORECASE,
)
"""A secret value by its name, also outside an address."""

TOKEN_PATTERN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
"""Keys that their makers' prefixes give away: Hugging Face, AWS, GitHub, GitLab, OpenAI, Slack,
Google, and JSON web tokens."""


def mask_secrets(text: str) -> str:
    """Replace what is or may be a credential by `***`: for messages, records and reports.

    In an address that is the user and the password, and the value of each parameter that is not in
    `ALLOWED_PARAMETERS`.
    """
    text = ADDRESS_PATTERN.sub(lambda match: _mask_address(match[1], match[2]), text)
    return TOKEN_PATTERN.sub(MASK, PARAMETER_PATTERN.sub(MASK, text))


def has_secrets(text: str) -> bool:
    """Check whether text contains what `mask_secrets` would replace, line ends ignored."""
    joined = "".join(text.split())
    return mask_secrets(joined) != joined or mask_secrets(text) != text


def _mask_address(scheme: str, rest: str) -> str:
    """Mask an address.

    Args:
        scheme: Before `://`.
        rest: Behind it.
    """
    user, at, host = rest.rpartition("@")
    first = user.partition("/")[0]
    # Secret keys may contain a slash, so the user need not end at the first one.
    is_container = scheme.lower() in CONTAINER_SCHEMES and ":" not in first
    if at and (":" in first or user == first) and not is_container:
        rest = f"{MASK}@{host}"
    place, *parts = re.split(r"([?&;#])", rest)
    is_web = scheme.lower() in WEB_SCHEMES
    for mark, part in zip(parts[::2], parts[1::2], strict=True):
        name, equals, _ = part.partition("=")
        if equals and name not in ALLOWED_PARAMETERS:
            part = f"{name}={MASK}"  # noqa: PLW2901
        elif part and not equals and is_web:
            part = MASK  # noqa: PLW2901
        place += mark + part
    return f"{scheme}://{place}"
