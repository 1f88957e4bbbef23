"""The results of a run -> the model card: README.md beside the trained model."""

import yaml

from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.config.text import escape_markdown, fence_code, mark_code
from rayfuse.config.train import describe_curve
from rayfuse.report.gather import Findings
from rayfuse.report.tables import render_tables
from rayfuse.report.verdict import Verdict


def build_model_card(findings: Findings, verdict: Verdict, recipe: Recipe) -> str:
    """Write the model card: what the model is made from, how, and its scores.

    Args:
        findings: The results.
        verdict: The claims that they support.
        recipe: The run's.
    """
    front = {
        "base_model": recipe.target.model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-fusion", "rayfuse"],
    }
    recipe_text = yaml.safe_dump(dump_recipe(recipe), sort_keys=False, allow_unicode=True)
    sentences = "\n".join(f"- {escape_markdown(sentence)}" for sentence in verdict.sentences)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
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

The licences and terms of use of the base model, of every source and of the text apply.

## How it was made

Every source scored the training text; its distributions over next tokens were aligned with the
target's tokens byte by byte, fused by `{recipe.fuse.method}`, and the target was trained on
lambda \\* CLM + (1 - lambda) \\* D(fused || target), lambda =
{describe_curve(recipe.train.clm_weight)}.
The method follows FuseLLM (arXiv 2401.10491).

The complete recipe:

{fence_code(recipe_text.strip(), "yaml")}
"""


def _count_sources(recipe: Recipe) -> str:
    number = len(recipe.sources)
    return "1 source" if number == 1 else f"{number} sources"


def _list_sources(recipe: Recipe) -> str:
    return "\n".join(
        f"- Source {escape_markdown(source.name)}: {_name_model(source)}"
        for source in recipe.sources
    )


def _name_model(model: ModelSettings) -> str:
    named = _name_files(model.model, model.revision)
    if model.adapter is None:
        return named
    return f"{named}, with the adapter {_name_files(model.adapter, model.adapter_revision)}"


def _name_files(name: str, revision: str | None) -> str:
    return mark_code(name) if revision is None else f"{mark_code(name)} at {mark_code(revision)}"
