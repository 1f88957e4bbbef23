"""Captured -> aligned shards, without a GPU.

ray job submit --working-dir . -- python jobs/align.py RECIPE [SECTION.KEY=VALUE ...]
"""

import sys

from rayfuse.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "align")
    main()
