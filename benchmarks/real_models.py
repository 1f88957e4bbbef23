"""Fuse two real LLMs, end to end: recipes/small-models.yaml on local models, on two corpora.

    python -m benchmarks.real_models --models DIR --out DIR [--corpora little ample] [--only-train]

DIR of --models has `smollm2-135m-instruct`, the target, and `gemma-3-270m`, the source; the
target's own copy is the second source. `little` is 25,000 tokens, read 8 times, `ample` 200,000,
read once. Both have the same domains and held-out documents. Each corpus is one storage folder, and
each variant one `rayfuse train` on it, so a killed run resumes. Variants of fusion and of CLM are
chosen by their best validation, on the half of the held-out documents that no model is compared on;
the chosen two are evaluated on the other half and on tasks. DIR/results.json has the table, by
domain, with intervals.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rayfuse.config.load import read_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.pipeline import prepare_run

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "small-models.yaml"
TARGET, SOURCE = "smollm2-135m-instruct", "gemma-3-270m"

DOMAINS = ("wiki", "books", "code", "math", "web", "legal")
MAX_CHARACTERS = 2000
"""Documents are cut here, at whitespace, so that they are of many kinds."""

FINDINGS = (
    "bits_per_byte",
    "fused_minus",
    "tasks",
    "fused_minus_at_tasks",
    "signals",
    "training",
    "verdict",
)
"""What is copied from the report's findings.json."""

TASKS = ("local_arc_easy", "local_boolq", "local_hellaswag", "local_openbookqa")


@dataclass(frozen=True)
class Pair:
    """Settings of a fused target and of CLM, which `rayfuse train` trains side by side."""

    fused_rate: float
    clm_weight: float
    clm_rate: float

    def overrides(self) -> list[str]:
        """Write the settings as a command's overrides."""
        return [
            f"train.learning_rate={self.fused_rate}",
            f"train.lambda={self.clm_weight}",
            f"train.baseline_learning_rate={self.clm_rate}",
        ]


@dataclass(frozen=True)
class Corpus:
    """A corpus and the variants that are trained on it."""

    tokens: int
    """Of the target, all domains together."""
    epochs: int
    validate_every_steps: int
    pairs: tuple[Pair, ...]


CORPORA = {
    "little": Corpus(
        25_000, 8, 8, (Pair(2e-5, 0.5, 1e-5), Pair(5e-5, 0.2, 2e-5), Pair(1e-4, 0.2, 5e-5))
    ),
    "ample": Corpus(200_000, 1, 25, (Pair(2e-5, 0.8, 2e-5), Pair(5e-5, 0.5, 5e-5))),
}


def main() -> None:
    """Run the corpora, and write and print what is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--corpora", nargs="+", choices=list(CORPORA), default=list(CORPORA))
    parser.add_argument("--held-out-bytes", type=int, default=30_000, help="of each domain")
    parser.add_argument("--questions", type=int, default=50, help="of each task; 0 for no tasks")
    parser.add_argument("--only-train", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as target.dtype=bfloat16")
    given = parser.parse_args()
    results = {name: _run_corpus(name, given) for name in given.corpora}
    path = given.out / "results.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | results, indent=1) + "\n")
    print(json.dumps(known | results, indent=1))


def _run_corpus(name: str, given: argparse.Namespace) -> dict[str, Any]:
    recipe, pairs = write_corpus(name, CORPORA[name], given), CORPORA[name].pairs
    for stage in ("corpus", "capture", "align"):
        _rayfuse(stage, recipe, given.overrides)
    validations: list[dict[str, float]] = []
    for pair in pairs:
        overrides = [*pair.overrides(), *given.overrides]
        _rayfuse("train", recipe, overrides)
        validations.append(read_best_validations(recipe, overrides))
    chosen = choose(pairs, validations)
    rows = [asdict(pair) | best for pair, best in zip(pairs, validations, strict=True)]
    result: dict[str, Any] = {"chosen": asdict(chosen), "validations": rows}
    if not given.only_train:
        _rayfuse("run", recipe, [*chosen.overrides(), *given.overrides])
        report = given.out / f"{name}-run" / "report"
        findings = json.loads((report / "findings.json").read_text())
        result |= {key: findings[key] for key in FINDINGS}
    return result


def choose(pairs: Sequence[Pair], validations: Sequence[dict[str, float]]) -> Pair:
    """Combine the settings of the fused target and those of CLM that were best in validation."""
    fused, clm = (
        min(range(len(pairs)), key=lambda index: validations[index][run])
        for run in ("fused", "clm")
    )
    return replace(pairs[fused], clm_rate=pairs[clm].clm_rate)


def write_corpus(name: str, corpus: Corpus, given: argparse.Namespace) -> Path:
    """Write a corpus' texts and its recipe, unless they exist."""
    recipe = given.out / f"{name}.yaml"
    if not recipe.is_file():
        write_texts(given.out / name, corpus.tokens, given)
        recipe.write_text(yaml.safe_dump(_localise(name, corpus, given), sort_keys=False))
    return recipe


def _rayfuse(command: str, recipe: Path, overrides: Sequence[str]) -> None:
    """Run a command as a user does; its output goes to the terminal."""
    arguments = [sys.executable, "-m", "rayfuse", command, str(recipe), *overrides]
    subprocess.run(arguments, check=True, cwd=ROOT)


def read_best_validations(recipe: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Read the lowest bits per byte of the validations of `fused` and `clm`."""
    layout = prepare_run(read_recipe(recipe, list(overrides)))
    best: dict[str, float] = {}
    for run in layout.runs:
        lines = layout.store.read(f"{run.folder}/metrics.jsonl").decode().splitlines()
        records = [json.loads(line) for line in lines]
        best[run.name] = min(one["bits_per_byte"] for one in records if "bits_per_byte" in one)
    return best


def _localise(name: str, corpus: Corpus, given: argparse.Namespace) -> dict[str, Any]:
    """Put local models, documents and a corpus' own settings into the recipe for users."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    folder, target = given.out.resolve() / name, str((given.models / TARGET).resolve())
    recipe["storage"] = str(given.out.resolve() / f"{name}-run")
    recipe["corpus"] |= {"documents": str(folder / "corpus.jsonl"), "shard_tokens": 25_000}
    recipe["target"]["model"] = target
    gemma, copy = recipe["sources"]
    gemma["model"], copy["model"] = str((given.models / SOURCE).resolve()), target
    recipe["capture"]["batch_tokens"] = 2048
    recipe["train"] |= {
        "epochs": corpus.epochs,
        "validate_every_steps": corpus.validate_every_steps,
        "checkpoint_every_steps": 100,
    }
    tasks = {
        "folder": str(ROOT / "recipes" / "tasks"),
        "data": str((given.data / "eval").resolve()),
    }
    recipe["evaluate"] = {"documents": str(folder / "held_out.jsonl"), "batch_tokens": 2048}
    if given.questions:
        recipe["evaluate"]["tasks"] = {**tasks, "names": list(TASKS), "limit": given.questions}
    return recipe


def write_texts(folder: Path, tokens: int, given: argparse.Namespace) -> None:
    """Write the corpus and the held-out documents, an equal share of each domain.

    Raises:
        ValueError: A domain has too little text.
    """
    tokenizer = load_recipe_tokenizer(ModelSettings(model=str(given.models / TARGET)))
    folder.mkdir(parents=True, exist_ok=True)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode([text])[0])

    parts = (
        ("corpus", "train", tokens // len(DOMAINS), count_tokens),
        ("held_out", "valid", given.held_out_bytes, lambda text: len(text.encode())),
    )
    for name, part, size, measure in parts:
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for domain in DOMAINS:
                used = 0
                for record in _read_documents(given.data / "corpus" / domain / f"{part}.jsonl.gz"):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    used += measure(record["text"])
                    if used >= size:
                        break
                else:
                    raise ValueError(f"{domain}: {used} of {size}; choose a smaller corpus")


def _read_documents(path: Path) -> Iterator[dict[str, str]]:
    """Read documents, cut at whitespace."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            text = record["text"]
            if len(text) > MAX_CHARACTERS:
                text = text[:MAX_CHARACTERS].rsplit(maxsplit=1)[0]
            yield {"id": record["id"], "domain": path.parent.name, "text": text}


if __name__ == "__main__":
    main()
