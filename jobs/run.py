"""Run all stages of a recipe as a Ray job: `python -m rayfuse run`, for clusters without rayfuse.

ray job submit --working-dir . -- python jobs/run.py RECIPE [SECTION.KEY=VALUE ...]
"""

import sys

from rayfuse.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
