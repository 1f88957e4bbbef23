"""All stages of a recipe.

ray job submit --working-dir . -- python jobs/run.py RECIPE [SECTION.KEY=VALUE ...]
"""

import sys

from rayfuse.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
