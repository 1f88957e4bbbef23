"""`exact`: one source token for one target token, of the same bytes; all other mass is tail."""

from functools import partial

from rayfuse.align.matches import Matches, keep_one_to_one, match_positions
from rayfuse.align.method import Alignment, Method
from rayfuse.align.token_spans import PlacedTokens
from rayfuse.align.vocab_map import map_vocabulary


def match_one_to_one(source: PlacedTokens, target: PlacedTokens, alignment: Alignment) -> Matches:
    """Match the positions of one byte at which both next tokens are the same piece of text."""
    del alignment
    return keep_one_to_one(match_positions(source, target), source, target)


METHOD = Method(match=match_one_to_one, build_map=partial(map_vocabulary, only_equal=True))
