"""The recipe that `rayfuse init` prints; its commented-out settings have their default values."""

import importlib.resources

TEMPLATE_FILE = importlib.resources.files("rayfuse.config") / "template.yaml"


def read_template() -> str:
    """Read the template of a recipe, a valid recipe with placeholder models and paths."""
    return TEMPLATE_FILE.read_text(encoding="utf-8")
