"""The fenced blocks of a page."""

from pathlib import Path

from docs.site_pages import FENCE

ROOT = Path(__file__).parents[2]


def read_blocks(page: str, *kinds: str) -> list[str]:
    """Read a page's blocks of some kinds, in order."""
    text = (ROOT / page).read_text()
    return [match["body"] for match in FENCE.finditer(text) if match["kind"] in kinds]
