"""A model to be scored: checked by the driver, and as files that a worker can load."""

from collections.abc import Iterator
from contextlib import contextmanager

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe
from rayfuse.models.architecture import compare_tensors
from rayfuse.run.layout import Layout, describe_model
from rayfuse.run.made_models import DONE_FILE, is_made
from rayfuse.runtime.scratch import scratch_folder
from rayfuse.storage.files import check_files, download_files
from rayfuse.storage.store import Store


@contextmanager
def local_model(model: ModelSettings, store: Store, folder: str | None) -> Iterator[ModelSettings]:
    """Yield a model that can be loaded; one in object storage is downloaded for the duration.

    Args:
        model: The model as the recipe or the run names it.
        store: The storage of the run.
        folder: Where this run has stored the model, below the storage root. None for a model that
            this run has not made: transformers finds it by its path or hub id.

    Raises:
        ShardError: A file of the model is missing or corrupt.
    """
    if folder is None:
        yield model
        return
    record = f"{folder.removesuffix('/model')}/{DONE_FILE}"
    if store.is_local:
        check_files(store, record)
        yield model
        return
    with scratch_folder("model") as local:
        download_files(store, record, "model/", local)
        yield model.model_copy(update={"model": str(local)})


def check_trained(recipe: Recipe, layout: Layout, name: str) -> None:
    """Check that a model is trained and, on a local disk, that all its tensors are there.

    Raises:
        UserError: It is not trained, or its files are not those of its architecture.
    """
    run = next((run for run in layout.runs if run.name == name), None)
    if run is None:
        return
    if not is_made(layout.store, run.folder, {}):
        raise UserError(f"the model {name} is not trained; run `rayfuse train` first")
    if layout.store.is_local:
        try:
            compare_tensors(describe_model(recipe, name, layout))
        except UserError as error:
            raise UserError(
                f"the model {name} is no longer as it was trained: {error}. Or remove "
                f"{layout.store.root}/{run.folder}/done.json, and run `rayfuse train` again"
            ) from error
