"""Fingerprints: short hashes of everything that decides a result."""

import hashlib
import json
from typing import Any

FINGERPRINT_VERSION = 4
"""Bumped when the same settings compute another result. A renamed setting or column is no reason:
it would make every captured data set useless (`rayfuse migrate` renames in place)."""

_FIRST_NAMES = {"min_edit_distance": "mined", "cooccurrence": "statistics"}
"""Values that were renamed keep the name in fingerprints that they were introduced with."""


def fingerprint_of(**parts: Any) -> str:
    """Hash plain JSON values into 12 hexadecimal digits, independent of their order."""
    text = json.dumps(parts | {"schema_version": FINGERPRINT_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def first_name(value: str) -> str:
    """Name the value of a setting as fingerprints have always named it."""
    return _FIRST_NAMES.get(value, value)
