"""The commands of `rayfuse --help`, grouped by what they are for."""

from typing import Any

from typer.core import TyperGroup

GROUPS: dict[str, tuple[str, ...]] = {
    "Run": ("run", "corpus", "capture", "align", "train", "evaluate", "report", "merge"),
    "Look": ("plan", "doctor", "status", "watch", "verify", "inspect"),
    "Tools": ("init", "demo", "import", "push", "clean", "migrate"),
}
"""The commands of each group, in the order of `rayfuse --help`."""

MAX_WIDTH = 110
"""Characters of a line of help, on a terminal that has as many."""


class CommandGroup(TyperGroup):
    """Lists its commands in groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width
        for title, names in GROUPS.items():
            with formatter.section(title):
                rows = [
                    (name.ljust(width), self.commands[name].get_short_help_str(limit))
                    for name in names
                ]
                formatter.write_dl(rows)
