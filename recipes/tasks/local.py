"""Evaluation sets as lm-eval's tasks see them, read from the folder that the recipe names.

Each loader is given `data` (evaluate.tasks.data) and what its task's `dataset_kwargs` say.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

BBH_QUESTION = re.compile(r"\nQ: ")
"""Before each worked example of a BIG-Bench Hard prompt."""

Splits = dict[str, Dataset]


def load_lines(data: str, file: str, **_: object) -> Splits:
    """Return the set of a JSON Lines file, plain or gz."""
    path = Path(data).expanduser() / file
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return {"test": Dataset.from_list([json.loads(line) for line in content.splitlines()])}


def load_bbh(data: str, subtask: str, **_: object) -> Splits:
    """Return one set of BIG-Bench Hard: each question behind the set's own worked examples."""
    folder = Path(data).expanduser() / "bbh"
    examples: list[dict[str, str]] = json.loads((folder / f"{subtask}.json").read_text())[
        "examples"
    ]
    # Above the line is a canary, that models may be kept from training on it: no part of the task.
    prompt = (folder / f"{subtask}.cot-prompt.txt").read_text().partition("-----\n")[2].strip()
    rows = [
        {"question": example["input"], "target": example["target"], "prompt": prompt}
        for example in examples
    ]
    return {"test": Dataset.from_list(rows)}


def ask_bbh(doc: dict[str, Any]) -> str:
    """Return a question behind the worked examples, and the words that begin the work."""
    return f"{doc['prompt']}\n\nQ: {doc['question']}\nA: Let's think step by step.\n"


def answer_gsm8k(doc: dict[str, Any]) -> str:
    """Return the number that a worked answer ends with."""
    return doc["answer"].rpartition("#### ")[2].replace(",", "")


def work_gsm8k(doc: dict[str, Any]) -> str:
    """Return a worked answer without the calculator's notes."""
    return re.sub(r"<<.*?>>", "", doc["answer"]).replace("#### ", "The answer is ")
