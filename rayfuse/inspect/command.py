"""The command `rayfuse inspect`: pairs of tokenizers or a recipe in, a report and a page out."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.align.pair import align_texts
from rayfuse.align.task import align_captured, plan_task
from rayfuse.config.base import UserError
from rayfuse.config.load import read_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.inspect.html import build_page
from rayfuse.inspect.report import report_pair
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.run.layout import Layout, plan_layout

PIECE_CHARACTERS = 20_000
"""A text file is cut into pieces of about this length, at line ends."""

SAMPLE = """The quick brown fox jumps over the lazy dog, 1,234 times in 2024; isn't that odd?

def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # no check

漢字かな交じり文と、中文句子。 Zwölf Boxkämpfer jagen Viktor. Съешь ещё этих мягких булок.
"""
"""The text that is tokenized by default."""


NOT_CAPTURED = "nothing captured yet"


def inspect_pairs(
    source: str, target: str | None, text: Path | None, page: Path | None
) -> list[dict[str, Any]]:
    """Report on each pair of tokenizers, and write the page of the first.

    Args:
        source: A tokenizer's folder or hub id, or a recipe file.
        target: A tokenizer; with a recipe the name of one of its sources, or nothing for all.
        text: A file to tokenize; a sample without it.
        page: An HTML file to write.

    Raises:
        UserError: A tokenizer cannot be loaded, the text cannot be read, the page cannot be
            written, or a pair cannot be aligned.
    """
    if page is not None:
        _check_writable(page)
    texts = _read_pieces(text)
    recipe = read_recipe(source) if is_recipe(source) else None
    method = recipe.align.method if recipe else "bytes"
    results: list[dict[str, Any]] = []
    for name, *tokenizers in _list_pairs(source, target, recipe):
        names = (name, recipe.target.model if recipe else str(target))
        first_page = page if not results else None
        results.append(_inspect_pair(names, tokenizers, texts, method, first_page))
    if recipe is not None:
        masses = _measure_masses(recipe, [result["source"] for result in results])
        results = [result | mass for result, mass in zip(results, masses, strict=True)]
    return results


def inspect_tokenizers(source: str, target: str, text: str | None = None) -> dict[str, Any]:
    """Measure how the tokens of two tokenizers align on a text: coverage, and the worst tokens.

    Args:
        source: The folder or hub id of a source's tokenizer.
        target: The folder or hub id of the target's tokenizer.
        text: The text; by default a sample of English, Python, Chinese, Japanese, German and
            Russian.

    Returns:
        What `rayfuse inspect SOURCE TARGET --json` prints.

    Raises:
        UserError: A tokenizer cannot be loaded, the text is empty, or the pair cannot be aligned.
    """
    if text == "":
        raise UserError("text is empty; give some text, or None for a sample")
    texts = [SAMPLE] if text is None else _cut(text)
    tokenizers = [load_tokenizer(source), load_tokenizer(target)]
    return _inspect_pair((source, target), tokenizers, texts, "bytes", None)


def _inspect_pair(
    names: tuple[str, str],
    tokenizers: list[TextTokenizer],
    texts: list[str],
    method: str,
    page: Path | None,
) -> dict[str, Any]:
    """Report on a pair of tokenizers, source and target, and write its page if there is one."""
    source, target = tokenizers
    aligned = align_texts(texts, source, target, method)
    report = report_pair(aligned)
    if page is not None:
        page.write_text(build_page(aligned, report, names), encoding="utf-8")
    return {
        "source": names[0],
        "target": names[1],
        **report.as_json(),
        "source_control_names": source.count_control_names(texts),
        "target_control_names": target.count_control_names(texts),
    }


def is_recipe(source: str) -> bool:
    """Check that the argument is a recipe file; tokenizers are folders or hub ids."""
    return source.endswith((".yaml", ".yml")) or Path(source).is_file()


def _check_writable(page: Path) -> None:
    is_new = not page.exists()
    try:
        page.open("ab").close()
    except OSError as error:
        raise UserError(
            f"--html is {str(page)!r}, which cannot be written ({error}); "
            "give a file in a folder that exists"
        ) from error
    if is_new:
        page.unlink()


def _list_pairs(
    source: str, target: str | None, recipe: Recipe | None
) -> list[tuple[str, TextTokenizer, TextTokenizer]]:
    if recipe is None:
        if target is None:
            raise UserError(f"inspect {source}: give a second tokenizer to align it with")
        return [(source, load_tokenizer(source), load_tokenizer(target))]
    names = [known.name for known in recipe.sources]
    if target is not None and target not in names:
        raise UserError(f"{target!r} is not a source of {source}; sources: {', '.join(names)}")
    target_tokenizer = load_recipe_tokenizer(recipe.target)
    return [
        (chosen.name, load_recipe_tokenizer(chosen), target_tokenizer)
        for chosen in recipe.sources
        if target in (None, chosen.name)
    ]


def _read_pieces(path: Path | None) -> list[str]:
    if path is None:
        return [SAMPLE]
    try:
        content = path.read_bytes().decode()  # not read_text: that would change line ends
    except OSError as error:
        raise UserError(f"--text is {str(path)!r}, which cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text is {str(path)!r}, which is not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error
    if not content:
        raise UserError(f"--text is {str(path)!r}, which is empty; give a file with some text")
    return _cut(content)


def _cut(content: str) -> list[str]:
    """Cut a text into pieces at line ends."""
    pieces, size = [""], 0
    for line in content.splitlines(keepends=True):
        if size > PIECE_CHARACTERS:
            pieces.append("")
            size = 0
        pieces[-1] += line
        size += len(line)
    return pieces


def _measure_masses(recipe: Recipe, names: list[str]) -> list[dict[str, Any]]:
    """Measure how much of each source's captured probability mapping keeps.

    Where that is unknown, a note gives the reason: the rest of the report needs the tokenizers
    alone, so it is printed for a recipe that cannot be run yet.
    """
    try:
        layout = plan_layout(recipe, ALIGN_FACTS)
    except ValueError as error:
        return [{"captured_mass": None, "captured_note": f"{NOT_CAPTURED} ({error})"}] * len(names)
    return [_measure_mass(recipe, layout, name) for name in names]


def _measure_mass(recipe: Recipe, layout: Layout, name: str) -> dict[str, Any]:
    commits = layout.captured[name].commits()
    if not commits:
        return {"captured_mass": None, "captured_note": NOT_CAPTURED}
    if not _is_map_ready(layout, name):
        note = f"unknown: no map for align.method {recipe.align.method} yet; run `rayfuse align`"
        return {"captured_mass": None, "captured_note": note}
    source = next(known for known in recipe.sources if known.name == name)
    shard = min(commits)
    _, stats, _ = align_captured(plan_task(recipe, layout, source), shard)
    signals = max(stats["with_signal"], 1.0)
    captured = 1 - stats["captured_tail_mass"] / signals
    kept = 1 - stats["tail_mass"] / signals
    shares: dict[str, float] = {}
    if "inside_tokens" in stats:
        positions = max(stats["positions"], 1.0)
        shares["captured_with_signal"] = stats["with_signal"] / positions
        shares["captured_at_start"] = (stats["with_signal"] - stats["inside_tokens"]) / positions
    return shares | {
        "captured_shard": shard,
        "captured_mass": captured,
        "kept_mass": kept,
        "lost_mass": captured - kept,
    }


def _is_map_ready(layout: Layout, name: str) -> bool:
    file = layout.map_files.get(name)
    return file is None or file.removeprefix("maps/") in layout.store.sizes("maps")


def print_report(numbers: dict[str, Any], console: Console) -> None:
    """Print one pair's numbers as text."""
    line = partial(console.print, highlight=False)
    line(f"{numbers['source']} → {numbers['target']}")
    line(f"  align.method           {numbers['method']:>12}")
    line(f"  target tokens          {numbers['target_tokens']:>12,}")
    line(f"  source tokens          {numbers['source_tokens']:>12,}")
    line(f"  with a signal          {numbers['share_with_signal']:>12.1%}")
    if numbers["share_inside"]:
        share = numbers["share_inside"]
        line(f"  inside a token, at most{share:>12.1%}  (with align.inside_tokens)")
    line(f"  one token to one       {numbers['share_one_to_one']:>12.1%}")
    line(f"  inside a source token  {numbers['no_shared_boundary']:>12,}")
    for reason, count in numbers["unplaced"].items():
        line(f"  unplaced, {reason:<48} {count:,}")
    for role in ("source", "target"):
        if numbers[f"{role}_control_names"]:
            label = f"control tokens of the {role} in the text, read as characters"
            line(f"  {label:<58} {numbers[f'{role}_control_names']:,}")
    if numbers.get("captured_note"):
        line(f"  captured mass: {numbers['captured_note']}")
    elif "kept_mass" in numbers:
        line(
            f"  captured mass          {numbers['captured_mass']:>12.2%}  (head, shard "
            f"{numbers['captured_shard']})"
        )
        if "captured_with_signal" in numbers:
            line(f"  with a signal          {numbers['captured_with_signal']:>12.1%}  (this shard)")
            line(f"  at a token's start     {numbers['captured_at_start']:>12.1%}")
        line(f"  kept after mapping     {numbers['kept_mass']:>12.2%}")
        line(f"  lost to the tail       {numbers['lost_mass']:>12.2%}")
    line(f"  placed and matched     {numbers['tokens_per_second']:>12,.0f} tokens/s/core")
    if numbers["worst_tokens"]:
        line("  worst target tokens (without signal / occurrences, kind):")
        for worst in numbers["worst_tokens"]:
            count = f"{worst['without_signal']:,} / {worst['occurrences']:,}"
            line(f"    {worst['token']!r:<24} {count:<18} {worst['flag']}")
