"""Read the elements of a JSON array one at a time, so that a file of any size fits into memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

CHUNK_BYTES = 1 << 20

_BETWEEN = re.compile(r"[\s,]*")


def read_array(stream: Any, max_chars: int) -> Iterator[Any]:
    """Yield the elements of a JSON array.

    Args:
        stream: The array in UTF-8, as bytes.
        max_chars: Maximum length of an element in JSON.

    Raises:
        ValueError: It is no JSON array, ends in the middle, or has an element that is too long.
    """
    decoder, parser = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, number, is_open = "", 1, False
    while True:
        # As many bytes again as are waiting: an element is parsed few times, whatever its length.
        data = stream.read(max(CHUNK_BYTES, len(text)))
        text += decoder.decode(data, final=not data)
        if not is_open:
            text, is_open = _open_array(text), True
        at = 0
        while (at := _skip_to_element(text, at)) < len(text):
            if text[at] == "]":
                return
            try:
                element, end = parser.raw_decode(text, at)
            except RecursionError as error:
                raise ValueError(f"element {number} of its array is nested too deep") from error
            except ValueError as error:
                if not data or len(text) - at > max_chars:
                    raise ValueError(
                        f"element {number} of its array is no JSON, incomplete or over-long"
                    ) from error
                break  # the rest of the element follows
            if end == len(text) and data:
                break  # a number may continue
            yield element
            at, number = end, number + 1
        text = text[at:]
        if not data:
            raise ValueError("its array is incomplete")


def _open_array(text: str) -> str:
    rest = text.lstrip()
    if not rest.startswith("["):
        raise ValueError("it is no JSON array")
    return rest[1:]


def _skip_to_element(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return match.end() if match else at
