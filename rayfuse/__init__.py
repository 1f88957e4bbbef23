"""rayfuse: fuse several source LLMs into one target LLM, on a Ray cluster.

Text goes in; every source scores it; the sources' distributions are aligned to the target's
tokens and fused; the target learns from them. See README.md for the commands.
"""

__version__ = "0.1.0"
