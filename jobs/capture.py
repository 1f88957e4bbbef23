"""Rows -> what every source says of them, aligned.

ray job submit --working-dir . -- python jobs/capture.py RECIPE [SECTION.KEY=VALUE ...]
"""

import sys

from rayfuse.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "capture")
    main()
