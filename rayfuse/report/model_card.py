"""The results of a run -> the model card: README.md beside the trained model."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.config.text import escape_markdown, fence_code, mark_code
from rayfuse.config.train import describe_curve
from rayfuse.report.gather import Findings
from rayfuse.report.licences import UNNAMED, Licence
from rayfuse.report.page import format_seconds
from rayfuse.report.spans import sum_busy
from rayfuse.report.tables import render_tables
from rayfuse.report.verdict import Verdict

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

LOCAL_PATH = re.compile(r"^[/~]|^(file|local):|^[A-Za-z]:[\\/]|^\\\\|(^|[\\/])\.\.([\\/]|$)", re.I)
"""Absolute paths, also of Windows, addresses of local files, and paths through a parent folder."""


def build_model_card(
    findings: Findings,
    verdict: Verdict,
    recipe: Recipe,
    licences: Mapping[str, Licence],
) -> str:
    """Write the model card: what the model is made from, how, its scores, costs and limits.

    Args:
        findings: The results.
        verdict: The claims that they support.
        recipe: The run's.
        licences: Of `target` and of each source, by name.
    """
    recipe_text = yaml.safe_dump(dump_recipe(recipe), sort_keys=False, allow_unicode=True)
    sentences = "\n".join(f"- {escape_markdown(sentence)}" for sentence in verdict.sentences)
    return f"""---
{_build_front(recipe)}
---

# {mark_code(recipe.target.model)}, fused with {_count_sources(recipe)}

{escape_markdown(verdict.headline)}

{sentences}

## Scores

Bits per byte on held-out text, lower is better, the lowest of each column in bold.

{render_tables(findings)}
## What it is made from

- Base model (the target): {_name_model(recipe.target)}
{_list_sources(recipe)}

{_describe_licences(licences)}

## Data

{_describe_data(findings, recipe)}

## How it was made

{_describe_method(recipe)}

## Costs

{_describe_costs(findings, recipe)}

## Limits

{_describe_limits(findings, recipe)}

## Complete recipe

{fence_code(recipe_text.strip(), "yaml")}
"""


def is_hub_id(model: str) -> bool:
    """Check that a model's name is a hub id, OWNER/NAME, and no folder."""
    return HUB_ID.fullmatch(model) is not None and not Path(model).expanduser().is_dir()


def list_local_paths(recipe: Recipe) -> list[str]:
    """List the local paths that a recipe names beyond its folder, and its card with it."""
    return sorted({text for text in _walk_texts(dump_recipe(recipe)) if LOCAL_PATH.search(text)})


def _walk_texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        items: Any = value.values() if isinstance(value, dict) else value
        for item in items:
            yield from _walk_texts(item)


def _build_front(recipe: Recipe) -> str:
    """Build the metadata that hubs read."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-fusion", "rayfuse"],
    }
    if is_hub_id(recipe.target.model):  # a hub refuses a card whose base model is a folder
        front = {"base_model": recipe.target.model, **front}
    return yaml.safe_dump(front, sort_keys=False).strip()


def _describe_method(recipe: Recipe) -> str:
    return f"""\
Every source scored the training text; its distributions over next tokens were aligned with the
target's tokens byte by byte, fused by `{recipe.fuse.method}`, and the target was trained on
lambda \\* CLM + (1 - lambda) \\* D(fused || target), lambda =
{describe_curve(recipe.train.clm_weight)}.
The method follows FuseLLM (arXiv 2401.10491)."""


def _describe_licences(licences: Mapping[str, Licence]) -> str:
    rows = [
        f"| {escape_markdown(name)} | {escape_markdown(licence.name or licence.note)} "
        f"| {escape_markdown(licence.terms)} |"
        for name, licence in licences.items()
    ]
    table = ["| model | licence | may models be trained on its outputs? |", "| --- | --- | --- |"]
    return "\n".join(
        [
            "The licences and terms of use of the base model, of every source and of the text",
            "apply. Licences are as the models' cards state them; the last column is a reading of",
            "the licence's text, no legal advice.",
            "",
            *table,
            *rows,
        ]
    )


def _describe_data(findings: Findings, recipe: Recipe) -> str:
    lines = [
        f"- Documents: {mark_code(documents.path)}"
        + (f", split {mark_code(documents.split)}" if documents.format == "dataset" else "")
        for documents in recipe.corpus.documents
    ]
    names = {"corpus": "Trained on", "held-out": "Scored on"}
    lines += [
        f"- {names[count.stage]} {count.rows:,} rows of {count.tokens:,} tokens of the target; "
        f"{count.rejects:,} documents or rows were rejected"
        for count in findings.counts
        if count.stage in names
    ]
    overlap = findings.overlap
    lines.append(
        f"- {overlap.shared:,} of {overlap.documents:,} held-out documents share a run of 13 words "
        "with the training text"
    )
    return "\n".join(lines)


def _describe_costs(findings: Findings, recipe: Recipe) -> str:
    """Describe the time of each stage; without a price per hour there are no dollars."""
    prices = {source.name: source.dollars_per_hour for source in recipe.sources}
    lines = [
        _describe_cost(f"Capture of {name}", sum_busy(spans), prices.get(name))
        for name, spans in findings.spans.items()
        if spans
    ]
    workers = recipe.train.num_workers
    lines += [
        f"- Training of {name}: {format_seconds(float(curve.seconds.sum()))} on "
        f"{workers} {'worker' if workers == 1 else 'workers'}, "
        f"{int(curve.tokens[-1]):,} tokens"
        for name, curve in findings.curves.items()
    ]
    seconds = sum(model.seconds for model in findings.evaluations.values())
    return "\n".join([*lines, f"- Evaluation on text: {format_seconds(seconds)} of all models"])


def _describe_cost(what: str, seconds: float, price: float | None) -> str:
    dollars = "" if price is None else f", {seconds / 3600 * price:.2f} dollars"
    return f"- {escape_markdown(what)}: {format_seconds(seconds)} of one actor{dollars}"


def _describe_limits(findings: Findings, recipe: Recipe) -> str:
    domains = {
        document.domain
        for model in findings.evaluations.values()
        for document in model.documents
        if document.domain
    }
    kinds = f" in {len(domains)} domains" if len(domains) > 1 else ""
    tasks = "" if findings.task_scores else " It was not scored on tasks."
    return "\n".join(
        [
            f"- It was compared on held-out text{kinds} of the kind it was trained on; nothing is",
            f"  known of other text.{tasks}",
            "- It repeats errors and biases of its sources and of the text. It was not tested for",
            "  harmful output, and not trained to refuse any.",
            f"- Rows were at most {recipe.corpus.max_tokens:,} tokens long: longer contexts are as",
            "  good as the base model's, or worse.",
        ]
    )


def _count_sources(recipe: Recipe) -> str:
    number = len(recipe.sources)
    return "1 source" if number == 1 else f"{number} sources"


def _list_sources(recipe: Recipe) -> str:
    return "\n".join(
        f"- Source {escape_markdown(source.name)}: {_name_source(source)}{_name_store(source)}"
        for source in recipe.sources
    )


def _name_source(source: SourceSettings) -> str:
    """Name a source; `model` is the target where its store was aligned by FuseLLM."""
    if source.captured_aligned is None:
        return _name_model(source)
    return f"{UNNAMED}, number {source.captured_aligned} of an aligned store"


def _name_store(source: SourceSettings) -> str:
    store = source.captured_from
    return "" if store is None else f", imported from {mark_code(store)} and not evaluated"


def _name_model(model: ModelSettings) -> str:
    named = _name_files(model.model, model.revision)
    if model.adapter is None:
        return named
    return f"{named}, with the adapter {_name_files(model.adapter, model.adapter_revision)}"


def _name_files(name: str, revision: str | None) -> str:
    return mark_code(name) if revision is None else f"{mark_code(name)} at {mark_code(revision)}"
