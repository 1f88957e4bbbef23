"""Numbers -> tables and plots.

ray job submit --working-dir . -- python jobs/report.py RECIPE [SECTION.KEY=VALUE ...]
"""

import sys

from rayfuse.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "report")
    main()
