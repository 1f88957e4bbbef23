"""Fused rows -> the target.

ray job submit --working-dir . -- python jobs/train.py RECIPE [SECTION.KEY=VALUE ...]
"""

import sys

from rayfuse.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
