"""Nodes over time, as a run requests, uses and releases them.

    python benchmarks/autoscaling.py [--out PNG] [--json]

The cluster is a head node with Ray's own autoscaler and a fake cloud on this machine: nodes are
processes, and their GPUs exist as resource counts only. The run is that of
`tests/cluster/test_autoscaling.py`, which asserts its properties.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt

from tests.cluster.fake_cloud import KINDS, Growth, run_and_watch

STYLES = ("-", "--", "-.", ":")


def draw(growth: Growth, path: Path) -> None:
    """Plot the nodes of each kind over time, and the end of each stage."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    began = growth.samples[0][0]
    times = [time - began for time, _ in growth.samples]
    for shift, (kind, style) in enumerate(zip(KINDS, STYLES, strict=True)):
        counts = [nodes[kind] + 0.03 * shift for _, nodes in growth.samples]
        axes.step(times, counts, style, where="post", label=kind)
    for stage, end in growth.ends.items():
        axes.axvline(end - began, color="0.7", linewidth=1)
        axes.annotate(
            f"{stage} done", (end - began, 2.25), rotation=90, va="top", ha="right", fontsize=8
        )
    axes.set(xlabel="seconds", ylabel="nodes", ylim=(0, 2.3), yticks=(0, 1, 2))
    axes.legend(title="kind", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run once, print when nodes were started and stopped, and plot it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("autoscaling.png"))
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        growth = run_and_watch(Path(folder))
    draw(growth, chosen.out)
    numbers = growth.describe()
    if chosen.json:
        print(json.dumps(numbers))
        return
    for name, value in numbers.items():
        print(f"{name}: {value}")
    print(chosen.out)


if __name__ == "__main__":
    main()
