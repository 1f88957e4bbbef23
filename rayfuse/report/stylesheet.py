"""The stylesheet of all HTML pages, embedded in each: a page needs no other file."""

from functools import cache
from pathlib import Path


@cache
def read_stylesheet() -> str:
    """Read the stylesheet, for a `<style>` element."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")
