"""An alignment method for tests, in one module as any other: only the first position of a row."""

import numpy as np

from rayfuse.align.matches import Matches, match_positions
from rayfuse.align.method import Alignment, Method
from rayfuse.align.token_spans import PlacedTokens
from rayfuse.align.vocab_map import map_vocabulary


def match_first(source: PlacedTokens, target: PlacedTokens, alignment: Alignment) -> Matches:
    del alignment
    matches = match_positions(source, target)
    return matches.select(np.isin(matches.target_at, target.offsets[:-1]), "not the first")


METHOD = Method(match=match_first, build_map=map_vocabulary)
