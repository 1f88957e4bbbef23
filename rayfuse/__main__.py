"""`python -m rayfuse`: the command, for job submission and for environments without its script."""

from rayfuse.cli import main

if __name__ == "__main__":
    main()
