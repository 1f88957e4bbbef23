"""A setting changes folder names if and only if it is declared to affect the result."""

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from rayfuse.config.base import Settings, affects_result
from rayfuse.config.load import parse_recipe
from rayfuse.config.overrides import RecipeError
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import name_folders
from tests.run.test_folder_names import BASE, list_names, prepare

VALUES: dict[str, Any] = BASE | {
    "storage": "/run",
    "capture": {"signal": "top_k_and_sampled_tail"},
    "train": {"lora": {"rank": 2}, "lambda": {"start": 0.2, "end": 0.8}},
    "evaluate": {"tasks": {"names": ["arc"]}},
}
"""A recipe in which every section has a value."""

ELSEWHERE = {
    "storage": "folders are named below it",
    "fusion": "it sets other settings, which are part of fingerprints",
    "target.trust_remote_code": "fingerprints contain the files that it lets load",
    "sources.0.trust_remote_code": "fingerprints contain the files that it lets load",
    "target.adapter": "fingerprints contain its files",
    "target.adapter_revision": "fingerprints contain its files",
    "sources.0.adapter": "fingerprints contain its files",
    "sources.0.adapter_revision": "fingerprints contain its files",
    "target.chat_template": "fingerprints contain the template, if documents are conversations",
    "sources.0.chat_template": "fingerprints contain the template, if documents are conversations",
    "evaluate.bootstrap_samples": "intervals are computed for each report again",
    "train.baseline": "it adds the folders of one more model and changes no other",
    "plan": "a section: its settings are listed below it",
}
"""Settings that affect the result, but not through folder names, each with the reason."""

SPARE_VALUES: list[Any] = [
    *(
        1,
        2,
        4096,
        0.5,
        True,
        "x",
        "exact",
        "avg_ce",
        "other.jsonl",
        ["x"],
        ["tensorboard"],
        ["ties"],
        [0.5, 0.5],
    ),
    *({"a": 3.0}, {"rank": 4}, {"names": ["x"]}, {"start": 0.1, "end": 0.2}),
    *({"m": {"parameters": 1e9}}, {"T4": {"spot_dollars": 0.1}}),
]
"""Values of many types, to try for settings whose value in `VALUES` cannot be varied."""


def list_settings(
    settings: Settings, prefix: str = "", is_effective: bool = True
) -> Iterator[tuple[str, bool]]:
    """Yield the path of each setting, and whether it is declared to affect the result."""
    for name, field in type(settings).model_fields.items():
        path = f"{prefix}{field.alias or name}"
        effective = is_effective and affects_result(field)
        value = getattr(settings, name)
        inner = value[0] if isinstance(value, tuple) and value else value
        if isinstance(inner, Settings):
            inner_prefix = f"{path}.0." if isinstance(value, tuple) else f"{path}."
            yield from list_settings(inner, inner_prefix, effective)
        else:
            yield path, effective


def change(plain: Recipe, path: str) -> Recipe:
    """Build a recipe that differs from another in one setting."""
    values = plain.model_dump(mode="json", by_alias=True)
    *sections, last = path.split(".")
    for candidate in list_candidates(plain, path):
        changed = copy.deepcopy(values)
        place: Any = changed
        for section in sections:
            place = place[int(section)] if section.isdigit() else place[section]
        place[last] = candidate
        try:
            recipe = parse_recipe(changed)
        except RecipeError:
            continue
        if recipe != plain:
            return recipe
    raise AssertionError(f"no other value found for {path}; add one to SPARE_VALUES")


def list_candidates(recipe: Recipe, path: str) -> Iterator[Any]:
    """Yield values to try for a setting, the likely ones first."""
    settings, field = recipe, None
    for part in path.split("."):
        if part.isdigit():
            settings = settings[int(part)]
            continue
        fields = {field.alias or name: name for name, field in type(settings).model_fields.items()}
        field = type(settings).model_fields[fields[part]]
        settings: Any = getattr(settings, fields[part])
    value, options = settings, get_args(field and field.annotation)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value * 2, value / 2, value + 1)
    elif isinstance(value, str):
        yield from (*options, f"{value}x")
    yield from SPARE_VALUES


SETTINGS = dict(list_settings(parse_recipe(VALUES)))

WITHOUT_DRAWS = {"sources.0.backend"}
"""Settings with a value that requires a signal without draws."""


WITH_STORE = {"sources.0.captured_from", "sources.0.captured_aligned"}
"""Settings of sources that are imported."""

WITH_BEST = {"train.patience"}
"""Settings with a value that requires `train.publish: best`."""


@pytest.mark.parametrize("path", [path for path in SETTINGS if path not in ELSEWHERE])
def test_folder_names_depend_on_exactly_the_settings_that_affect_the_result(path: str):
    values: dict[str, Any] = VALUES | ({"capture": {}} if path in WITHOUT_DRAWS else {})
    if path in WITH_BEST:
        values |= {"train": VALUES["train"] | {"publish": "best"}}
    if path in WITH_STORE:
        first, *others = VALUES["sources"]
        kept = {key: value for key, value in first.items() if not key.startswith("adapter")}
        values |= {"sources": [kept | {"captured_from": "logits"}, *others]}
    plain = parse_recipe(values)
    changed = change(plain, path)
    names, new_names = (list_names(name_folders(r, prepare(r))) for r in (plain, changed))
    assert (names != new_names) == SETTINGS[path]


def test_validation_and_held_out_text_count_if_they_choose_the_weights():
    last = VALUES | {"evaluate": {"documents": "one.jsonl"}}
    best = last | {"train": VALUES["train"] | {"publish": "best"}}
    for section, change in (
        ("train", {"validate_every_steps": 7}),
        ("train", {"validation_rows": 7}),
        ("evaluate", {"documents": "other.jsonl"}),
    ):
        for plain, counts in ((last, False), (best, True)):
            changed = plain | {section: plain.get(section, {}) | change}
            runs = [
                [run.folder for run in name_folders(recipe, prepare(recipe)).runs]
                for recipe in map(parse_recipe, (plain, changed))
            ]
            assert (runs[0] != runs[1]) == counts, (section, change)


def test_defaults_that_fingerprints_omit_are_what_was_computed_before_they_existed():
    """Changing one would give stored results another meaning: then they must be dumped."""
    assert parse_recipe(VALUES).fuse.switch_rate == 0.05
    assert (parse_recipe(VALUES).train.publish, parse_recipe(VALUES).train.patience) == (
        "last",
        None,
    )


def test_settings_elsewhere_exist():
    assert {*ELSEWHERE} <= {*SETTINGS, "plan"}


def test_all_settings_classes_are_covered():
    reached = {path.rpartition(".")[0] for path in SETTINGS}
    assert {"", "corpus", "corpus.documents.0", "target", "sources.0", "capture"} <= reached
    assert {"align", "fuse", "train", "train.lora", "evaluate", "evaluate.tasks"} <= reached
