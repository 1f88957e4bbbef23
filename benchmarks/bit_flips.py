"""Flip single bits of a finished run's files: `rayfuse verify` must name every one.

    python -m benchmarks.bit_flips RECIPE [section.key=value ...] [--samples N] [--out FILE]

Every bit of every sealed record is flipped, one at a time, and given to `unseal`, by which all
readers decode records: it must refuse each. Then bits of all files are flipped in place, every
STRIDE-th of the records, `dtype` and vocabulary maps, N random ones of each other file (shards,
weights, checkpoints, plots, pages). A flip is found if `verify` names a corrupt file, or refuses
the store with an error that names it; files are restored after each flip. Prints the counts by
kind, and each flip that was not found.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.capture.dtype import DTYPE_FILE
from rayfuse.config.base import UserError
from rayfuse.config.load import read_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.progress import report_nothing
from rayfuse.status import (
    list_data_sets,
    list_file_checks,
    list_token_nll,
    verify_layout,
    verify_segmentations,
)
from rayfuse.storage.seal import ShardError, is_sealed, unseal
from rayfuse.storage.verify import verify_data_set

RECORD_SUFFIXES = (".json", ".jsonl", "")
SEED = 0


def find_all_corrupt(recipe: Recipe) -> list[str]:
    """Verify a run as the command does; list the corrupt files."""
    found = {"segmentations": verify_segmentations(recipe)}
    found |= verify_layout(plan_layout(recipe, ALIGN_FACTS), report_nothing)
    return [fault.file for verified in found.values() for fault in verified.corrupt]


def find_corrupt(recipe: Recipe, layout: Layout, file: str) -> list[str]:
    """Run the part of `verify` that reads a file; list the corrupt files, or the error.

    Args:
        recipe: The run's.
        layout: The run's, planned before any flip.
        file: The file that was flipped, below the storage root.
    """
    try:
        for part in (*list_data_sets(layout), *list_token_nll(layout)):
            if file.startswith(f"{part.data.folder}/") and not file.endswith(f"/{DTYPE_FILE}"):
                return [fault.file for fault in verify_data_set(part.data).corrupt]
        checks = [faults for _, faults in list_file_checks(layout).values()]
        corrupt = [name for faults in checks for name, _ in faults]
        return corrupt + [fault.file for fault in verify_segmentations(recipe).corrupt]
    except (UserError, ShardError) as error:
        return [str(error)]


def name_kind(path: Path, root: Path) -> str:
    """Name the kind of a file: its stage, and the folder or suffix."""
    parts = path.relative_to(root).parts
    inner = [part for part in parts[1:-1] if part in ("commits", "data", "rejects", "model")]
    return "/".join([parts[0], *inner, path.suffix or path.name])


def choose_bits(path: Path, root: Path, samples: int, stride: int) -> Iterator[int]:
    """Choose the bits of a file to flip: every `stride`-th of a record or map, else a sample."""
    num_bits = 8 * path.stat().st_size
    is_record = path.suffix in RECORD_SUFFIXES and "model" not in path.parts
    if is_record or path.is_relative_to(root / "maps"):
        yield from range(0, num_bits, stride)
    else:
        generator = random.Random(f"{SEED} {path.relative_to(root)}")
        yield from (generator.randrange(num_bits) for _ in range(samples if num_bits else 0))


def list_accepted(path: Path) -> tuple[int, list[int]]:
    """Flip every bit of a file of sealed records; count the bits, and list those not refused."""
    lines = path.suffix == ".jsonl"
    content = path.read_bytes()
    accepted: list[int] = []
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            for record in bytes(flipped).splitlines() if lines else [bytes(flipped)]:
                unseal(record, path.name, indent=None if lines else 1)
        except ShardError:
            continue
        accepted.append(bit)
    return 8 * len(content), accepted


def flip_all(
    recipe: Recipe, samples: int, stride: int, deadline: float
) -> tuple[Counter[str], list[str]]:
    """Flip the chosen bits of every file.

    Args:
        recipe: The finished run's.
        samples: Bits of each file that is not a record.
        stride: Of a record or map, flip only bits whose number is a multiple.
        deadline: Monotonic time at which to stop.

    Returns:
        The number of flips by kind, and the flips that were not found.
    """
    root, layout = Path(recipe.storage), plan_layout(recipe, ALIGN_FACTS)
    tried: Counter[str] = Counter()
    missed: list[str] = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl") and is_sealed(content):
            number, accepted = list_accepted(path)
            tried[f"decoded {name_kind(path, root)}"] += number
            missed += [f"{path.relative_to(root)}, bit {bit}, decoded" for bit in accepted]
        for bit in choose_bits(path, root, samples, stride):
            if time.monotonic() > deadline:
                continue
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            tried[name_kind(path, root)] += 1
            file = path.relative_to(root).as_posix()
            if not find_corrupt(recipe, layout, file):
                missed.append(f"{file}, bit {bit}")
            path.write_bytes(content)
    return tried, missed


def main() -> None:
    """Flip bits of a run's files, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    recipe = read_recipe(given.recipe, given.overrides)
    faults = find_all_corrupt(recipe)
    assert not faults, f"the run is corrupt before any flip: {faults}"
    deadline = time.monotonic() + given.seconds
    tried, missed = flip_all(recipe, given.samples, given.stride, deadline)
    assert not find_all_corrupt(recipe), "a file was not restored"
    result = {"flips": dict(tried), "total": sum(tried.values()), "missed": missed}
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
