"""`rayfuse push`: list what would be published, and with `--upload` publish it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.config.text import show_controls
from rayfuse.evaluate.model_loading import local_model
from rayfuse.publish.gguf import convert_model, find_converter
from rayfuse.publish.hub import (
    check_access,
    check_name,
    list_present,
    list_removed,
    open_hub,
    upload_model,
)
from rayfuse.report.gather import gather_findings
from rayfuse.report.licences import Licence, read_licences
from rayfuse.report.model_card import build_model_card, list_local_paths
from rayfuse.report.verdict import judge
from rayfuse.run.failed_sources import drop_sources, plan_run
from rayfuse.run.layout import Layout, describe_model
from rayfuse.run.made_models import is_made, read_done, read_inputs
from rayfuse.runtime.scratch import scratch_folder

CARD = "README.md"


@dataclass(frozen=True)
class Publication:
    """What a push publishes."""

    recipe: Recipe
    layout: Layout
    folder: str
    """Of the model, below the storage root."""
    sizes: dict[str, int]
    """Bytes by file of the model, without the card."""
    card: str
    licences: dict[str, Licence]


def push_model(
    recipe: Recipe,
    repository: str,
    console: Console,
    *,
    upload: bool = False,
    public: bool = False,
    gguf: bool = False,
) -> dict[str, Any]:
    """Print what a push publishes, upload it if wanted, and return it as plain values.

    Args:
        recipe: The recipe.
        repository: USER/NAME on the hub.
        console: Where it is printed.
        upload: Upload it; else nothing is sent.
        public: The repository is public; else it is private.
        gguf: Publish a GGUF file, too.

    Raises:
        UserError: The name is not valid, there is no trained and evaluated model, no token or no
            right, the hub is unavailable, or the converter is missing or fails.
        ShardError: A file of the model is corrupt.
    """
    check_name(repository)
    converter = find_converter() if gguf else None
    if upload:
        check_access(open_hub(), repository, is_public=public)
    publication = prepare_publication(recipe)
    gguf_file = f"{repository.partition('/')[2]}.gguf" if gguf else None
    removed, fault = _find_removed(repository, publication, gguf_file, is_required=upload)
    _print_publication(publication, repository, console, public=public, gguf_file=gguf_file)
    for name in removed or []:
        console.print(f"removed from the hub: {show_controls(name)}", style="yellow", markup=False)
    if fault:
        console.print(f"files that it removes from the hub are not known: {fault}", markup=False)
    values: dict[str, Any] = {
        "repository": repository,
        "public": public,
        "files": publication.sizes | {CARD: len(publication.card.encode())},
        "licences": {name: licence.name for name, licence in publication.licences.items()},
        "removed": removed,
        "commit": None,
    }
    if not upload:
        console.print("nothing was uploaded; add --upload to upload it")
        return values
    with _convert(publication, converter, gguf_file) as files:
        commit = upload_model(
            open_hub(),
            repository,
            files,
            removed=removed or [],
            is_public=public,
            message="Upload the model fused by rayfuse",
        )
    console.print(f"uploaded: {commit}", highlight=False)
    return values | {"commit": commit}


def prepare_publication(recipe: Recipe) -> Publication:
    """Find the fused model of a run, and write its card from the run's results.

    Raises:
        UserError: It is not trained, or not evaluated.
        ShardError: A record is corrupt.
    """
    layout = plan_run(recipe, ALIGN_FACTS)
    recipe = drop_sources(recipe, layout.failed)
    run = next(run for run in layout.runs if run.name == "fused")
    if not is_made(layout.store, run.folder, read_inputs(layout, run)):
        raise UserError(
            f"there is no fused model in {layout.store.root}; run `rayfuse run` first, with the "
            "same recipe and overrides"
        )
    done = read_done(layout.store, run.folder)
    assert done is not None, "is_made has read it"
    licences = read_licences(recipe, is_online=True)
    findings = gather_findings(recipe, layout)
    prefix = "model/"
    return Publication(
        recipe=recipe,
        layout=layout,
        folder=f"{run.folder}/model",
        sizes={
            name.removeprefix(prefix): file["num_bytes"]
            for name, file in done["files"].items()
            if name.startswith(prefix) and name != prefix + CARD
        },
        card=build_model_card(findings, judge(findings, recipe), recipe, licences),
        licences=licences,
    )


def _find_removed(
    repository: str, publication: Publication, gguf_file: str | None, *, is_required: bool
) -> tuple[list[str] | None, str]:
    """List the files that a push removes; None, with the reason, if the hub cannot be read.

    Raises:
        UserError: They are required and unknown, or the repository has an adapter.
    """
    try:
        present = list_present(open_hub(), repository)
    except UserError as error:
        if is_required:
            raise
        return None, str(error)
    names = {*publication.sizes, CARD} | ({gguf_file} if gguf_file else set())
    return list_removed(present, names, repository), ""


@contextmanager
def _convert(
    publication: Publication, converter: str | None, gguf_file: str | None
) -> Iterator[dict[str, Path | bytes]]:
    """Yield the files to upload, checked against their record, by their names in the repository."""
    layout, folder = publication.layout, publication.folder
    model = describe_model(publication.recipe, "fused", layout)
    with local_model(model, layout.store, folder) as local, scratch_folder("gguf") as scratch:
        root = Path(local.model)
        files: dict[str, Path | bytes] = {name: root / name for name in publication.sizes}
        files[CARD] = publication.card.encode()
        if converter is not None and gguf_file is not None:
            convert_model(converter, root, scratch / gguf_file)
            files[gguf_file] = scratch / gguf_file
        yield files


def _print_publication(
    publication: Publication,
    repository: str,
    console: Console,
    *,
    public: bool,
    gguf_file: str | None,
) -> None:
    """Print the files with their sizes, the card, and what to know before it is published."""
    visibility = "public" if public else "private"
    root = f"{publication.layout.store.root}/{publication.folder}"
    console.print(f"{root} -> {repository} ({visibility})", highlight=False)
    sizes = publication.sizes | {CARD: len(publication.card.encode())}
    for name, size in sorted(sizes.items()):
        console.print(f"  {size:>14,} bytes  {show_controls(name)}", highlight=False, markup=False)
    if gguf_file is not None:
        console.print(f"  written on upload     {gguf_file}", highlight=False)
    console.print(f"  {sum(sizes.values()):>14,} bytes in {len(sizes)} files", highlight=False)
    console.print(show_controls(publication.card), highlight=False, markup=False)
    for warning in _list_warnings(publication):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def _list_warnings(publication: Publication) -> list[str]:
    warnings = [
        f"{name}: the licence {licence.name} of {licence.model} allows training on its outputs: "
        f"{licence.terms}"
        for name, licence in publication.licences.items()
        if licence.forbids and name != "target"
    ]
    warnings += [
        f"{name}: it is not known whether the licence of {licence.model} "
        f"({licence.name or licence.note}) allows training on its outputs; read its terms"
        for name, licence in publication.licences.items()
        if licence.is_unknown and name != "target"
    ]
    paths = list_local_paths(publication.recipe)
    if paths:
        warnings.append(f"the card's recipe names local paths, which it publishes: {paths}")
    return warnings
