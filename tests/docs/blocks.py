"""The fenced blocks of a page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)


def read_blocks(page: str, *kinds: str) -> list[str]:
    """Read a page's blocks of some kinds, in order."""
    text = (ROOT / page).read_text()
    return [match["body"] for match in FENCE.finditer(text) if match["kind"] in kinds]
