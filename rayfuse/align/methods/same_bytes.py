"""`bytes`: positions that start at the same byte, entries of the same bytes or their beginning."""

from rayfuse.align.matches import Matches, match_positions
from rayfuse.align.method import Alignment, Method
from rayfuse.align.token_spans import PlacedTokens
from rayfuse.align.vocab_map import map_vocabulary


def match_same_byte(source: PlacedTokens, target: PlacedTokens, alignment: Alignment) -> Matches:
    """Match the positions that start at the same byte; the alignment's maps play no part."""
    del alignment
    return match_positions(source, target)


METHOD = Method(match=match_same_byte, build_map=map_vocabulary)
