"""Which results of an evaluation are there, intact, and made from what there is now."""

from collections.abc import Callable, Iterator

from rayfuse.evaluate.scores import (
    OWN_ROLES,
    Evaluation,
    Role,
    keep_compared,
    parse_evaluation,
)
from rayfuse.run.layout import Layout, find_own_folder
from rayfuse.run.made_models import identify_model, is_current
from rayfuse.storage.files import hash_bytes
from rayfuse.storage.seal import REMEDY, ShardError, unseal
from rayfuse.storage.store import Store

HELD_OUT, MODEL = "held_out", "model"


def read_inputs(layout: Layout, name: str) -> dict[str, str]:
    """Read what the score of a model is made from now, as far as its fingerprint does not cover it.

    Args:
        layout: The run.
        name: The model's name in tables.

    Raises:
        ShardError: A record is corrupt.
    """
    manifest = layout.held_out.read_manifest()
    return _read_model_input(layout, name) | (
        {HELD_OUT: manifest.content_sha256} if manifest is not None else {}
    )


def _read_model_input(layout: Layout, name: str) -> dict[str, str]:
    folder = find_own_folder(name, layout)
    identity = folder and identify_model(layout.store, folder.removesuffix("/model"))
    return {MODEL: identity} if identity else {}


def read_task_inputs(layout: Layout, name: str) -> dict[str, str]:
    """Read what the score of a model at a task is made from now.

    Raises:
        ShardError: A record is corrupt.
    """
    return _read_model_input(layout, name)


def is_scored(store: Store, file: str, inputs: dict[str, str]) -> bool:
    """Check that a result is there and not stale.

    Raises:
        ShardError: It is corrupt.
    """
    try:
        record = unseal(store.read(file), f"{store.root}/{file}")
    except FileNotFoundError:
        return False
    return is_current(record.get("inputs", {}), inputs)


def describe_role(layout: Layout, name: str) -> Role:
    """Look up a model's role in a run by its name in tables."""
    if name in layout.evaluation.merged_pairs:
        return "merged"
    is_trained = any(run.name == name for run in layout.runs)
    return OWN_ROLES.get(name, "fused" if is_trained else "source")


def is_evaluated(layout: Layout) -> bool:
    """Check that every result of the evaluation is there and not stale.

    Raises:
        ShardError: A record is corrupt.
    """
    expected = _list_expected(layout)
    return all(is_scored(layout.store, file, inputs) for file, inputs in expected)


def _list_expected(layout: Layout) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every result file and what it is made from now."""
    for name, file in layout.evaluation.scores.items():
        yield file, read_inputs(layout, name)
    for name, files in layout.evaluation.task_scores.items():
        inputs = read_task_inputs(layout, name)
        for file in files.values():
            yield file, inputs


def read_evaluation(layout: Layout, file: str) -> Evaluation:
    """Read a model's evaluation, with the documents that models are compared on.

    Raises:
        FileNotFoundError: It does not exist.
        ShardError: It is corrupt.
    """
    found = parse_evaluation(layout.store.read(file), f"{layout.store.root}/{file}")
    return keep_compared(found) if layout.has_selection else found


def find_corrupt_results(layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield the results that are corrupt or stale, each with the reason; missing ones are not."""
    for name, file in layout.evaluation.scores.items():
        yield from _check(layout, file, lambda name=name: read_inputs(layout, name))
    for name, files in layout.evaluation.task_scores.items():
        for file in files.values():
            yield from _check(layout, file, lambda name=name: read_task_inputs(layout, name))


def _check(
    layout: Layout, file: str, read: Callable[[], dict[str, str]]
) -> Iterator[tuple[str, str]]:
    store = layout.store
    try:
        record = unseal(store.read(file), f"{store.root}/{file}")
    except FileNotFoundError:
        return
    except ShardError as error:
        yield file, str(error)
        return
    try:
        if not is_current(record.get("inputs", {}), read()):
            yield file, "is stale: the model or the held-out rows are others now"
    except ShardError:
        pass  # verifying the model or the rows reports it
    nll_file, sha256 = f"{file.removesuffix('.json')}.parquet", record.get("nll_sha256")
    if sha256:
        try:
            read_task_nll(store, nll_file, sha256)
        except ShardError as error:
            yield file, str(error)


def read_task_nll(store: Store, file: str, sha256: str) -> bytes:
    """Read the token NLL of a task's answers, and check every byte of it.

    Raises:
        ShardError: It is missing or corrupt.
    """
    try:
        content = store.read(file)
    except FileNotFoundError as error:
        raise ShardError(f"{store.root}/{file} is missing; {REMEDY}") from error
    if hash_bytes(content)["sha256"] != sha256:
        raise ShardError(f"{store.root}/{file} is corrupt; {REMEDY}")
    return content
