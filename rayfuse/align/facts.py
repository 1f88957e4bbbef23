"""What the checks and folder names of a run depend on in this package."""

from rayfuse.align.pair import check_pair
from rayfuse.align.shard import ALIGN_VERSION
from rayfuse.run.prepare import AlignFacts

ALIGN_FACTS = AlignFacts(version=ALIGN_VERSION, check_pair=check_pair)
