"""The licences that models state, and whether they allow training on their outputs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub  # imports its parts when they are used
import yaml

from rayfuse.config.base import UserError, first_line
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.models.folder import find_folder

CARD_FILE = "README.md"

MAX_CARD_BYTES = 2**20
"""The longest part of a model's card that is read."""

FREE = "yes"
SHARED = "yes, if the new model has the same licence"
RESTRICTED = "yes, if its restrictions of use are passed on"
UNKNOWN = "not known to rayfuse: read its terms"

TERMS: dict[str, str] = {
    "afl-3.0": FREE,
    "apache-2.0": FREE,
    "bsd-2-clause": FREE,
    "bsd-3-clause": FREE,
    "cc-by-4.0": FREE,
    "cc0-1.0": FREE,
    "isc": FREE,
    "mit": FREE,
    "unlicense": FREE,
    "cc-by-sa-3.0": SHARED,
    "cc-by-sa-4.0": SHARED,
    "gpl-3.0": SHARED,
    "bigcode-openrail-m": RESTRICTED,
    "bigscience-bloom-rail-1.0": RESTRICTED,
    "bigscience-openrail-m": RESTRICTED,
    "creativeml-openrail-m": RESTRICTED,
    "openrail": RESTRICTED,
    "cc-by-nc-4.0": "yes, not for commercial use",
    "cc-by-nc-sa-4.0": "yes, not for commercial use, and with the same licence",
    "gemma": "yes, under its own terms: a model trained on its outputs is a derivative",
    "llama2": "no, except for derivatives of Llama 2",
    "llama3": "no, except for derivatives of Llama 3",
    "llama3.1": "yes, if the new model's name begins with Llama and the licence is passed on",
    "llama3.2": "yes, if the new model's name begins with Llama and the licence is passed on",
    "llama3.3": "yes, if the new model's name begins with Llama and the licence is passed on",
}
"""Whether a model may be trained on the outputs of one with this licence, by the hub's name of the
licence. A reading of the licences' texts, no legal advice."""


def _find_key(name: str) -> str:
    """Reduce a licence's name to what its spellings have in common: Llama-3 is llama3."""
    return re.sub(r"[\s_-]", "", name.lower())


_KNOWN = {_find_key(name): terms for name, terms in TERMS.items()}

UNNAMED = "an unnamed model"
"""The model of a source that was imported from FuseLLM's alignment stage."""


@dataclass(frozen=True)
class Licence:
    """What a model states about its licence."""

    model: str
    """A folder or a hub id."""
    name: str | None
    """The hub's name of the licence, or of several; None if the model states none, or was not
    readable."""
    note: str = ""
    """Why there is no name."""

    @property
    def terms(self) -> str:
        """Whether training on outputs is allowed; of several licences, by all of them."""
        found = [_KNOWN.get(_find_key(name), UNKNOWN) for name in (self.name or "").split(", ")]
        forbidding = [terms for terms in found if terms.startswith("no,")]
        unknown = [terms for terms in found if terms == UNKNOWN]
        return next(iter([*forbidding, *unknown]), "; ".join(dict.fromkeys(found)))

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is known about training on outputs."""
        return self.terms == UNKNOWN

    @property
    def forbids(self) -> bool:
        """Whether the licence is known to forbid training on outputs."""
        return self.terms.startswith("no,")


def read_licences(recipe: Recipe, *, is_online: bool) -> dict[str, Licence]:
    """Read the licence of the target and of each source, by its name in tables.

    Args:
        recipe: The recipe.
        is_online: Download the cards of hub models; else only cached ones are read.
    """
    models = {"target": recipe.target} | {source.name: source for source in recipe.sources}
    return {name: read_licence(model, is_online=is_online) for name, model in models.items()}


def read_licence(model: ModelSettings, *, is_online: bool) -> Licence:
    """Read the licence that the card of a model states in its front matter."""
    if isinstance(model, SourceSettings) and model.captured_aligned is not None:
        return Licence(UNNAMED, None, "an aligned store does not name its model")
    try:
        folder = _find_card_folder(model, is_online=is_online)
        with (folder / CARD_FILE).open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8-sig", "replace")
    except FileNotFoundError:
        return Licence(model.model, None, "no model card was found")
    except (UserError, OSError) as error:
        return Licence(model.model, None, f"its card is not readable ({first_line(error)})")
    name = _find_name(_parse_front(text))
    return Licence(model.model, name, "" if name else "its card states none")


def _find_card_folder(model: ModelSettings, *, is_online: bool) -> Path:
    if is_online or Path(model.model).expanduser().is_dir():
        return find_folder(model.model, model.revision, (CARD_FILE,))
    cached = huggingface_hub.try_to_load_from_cache(model.model, CARD_FILE, revision=model.revision)
    if not isinstance(cached, str):
        raise FileNotFoundError(CARD_FILE)
    return Path(cached).parent


def _parse_front(text: str) -> Mapping[str, Any]:
    """Parse the YAML at the start of a card; empty if there is none, or it is no mapping."""
    match = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _find_name(front: Mapping[str, Any]) -> str | None:
    """Find the licences' names; models with a licence of their own name it beside `other`."""
    stated, own = front.get("license"), front.get("license_name")
    names = stated if isinstance(stated, list) else [stated]
    found = [name.strip().lower() for name in names if isinstance(name, str)]
    if isinstance(own, str) and own.strip():
        found = [own.strip().lower() if name == "other" else name for name in found]
    return ", ".join(name for name in found if name) or None
