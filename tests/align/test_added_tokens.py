"""Text around added tokens keeps its positions."""

import json

import pytest

from rayfuse.align.pair import align_texts
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from tests.fakes import byte_level_tokenizer, sentencepiece_tokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TEXT = "The cat<td>sat on</td> the mat, <td> and</td>the dog"


def add_tokens(make, *names: str) -> TextTokenizer:
    """Build a tokenizer whose vocabulary has added tokens that are text."""
    tokenizer = make(330)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] += [
        {"id": tokenizer.get_vocab_size() + i, "content": name, "special": False} | FLAGS
        for i, name in enumerate(names)
    ]
    return build_tokenizer(json.dumps(content), start_id=0, eos_id=1)


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("is_source", [True, False])
def test_no_position_is_lost_after_an_added_token(make, is_source):
    added = add_tokens(make, "<td>", "</td>")
    plain = add_tokens(byte_level_tokenizer)
    pair = (added, plain) if is_source else (plain, added)
    aligned = align_texts([TEXT], *pair)
    mine = aligned.source if is_source else aligned.target
    assert {"<td>", "</td>"} <= {added.token_names[i] for i in mine.ids.tolist()}
    assert not mine.faults.any()
    assert set(aligned.matches.unmatched) <= {"no shared boundary"}
