"""The measurement of half precision runs on any model, and finds the wide product more exact."""

import gzip
import json

from benchmarks.half_precision import measure
from rayfuse.demo.shipped import FOLDER


def test_the_wide_product_is_nearer_to_float64(tmp_path):
    text = tmp_path / "text.jsonl.gz"
    with gzip.open(text, "wt") as lines:
        lines.write(json.dumps({"text": "It was late in the year. " * 20}) + "\n")
    found = measure(str(FOLDER / "neox-prose"), text, rows=1)
    assert found["positions"]["number"] > 50
    for name, error in found["float32"].items():
        if name != "seconds":
            assert error < found["bfloat16"][name] / 10, name
