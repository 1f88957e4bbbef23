"""Findings as lines for people and as plain values for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from rayfuse.doctor.checks import Finding


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print what is wrong, each with its remedy."""
    for finding in findings:
        style = "red" if finding.severity == "error" else "yellow"
        console.print(f"{finding.severity}: {finding.check}: {finding.text}", style=style)
        console.print(f"  remedy: {finding.remedy}", highlight=False)
    errors = sum(finding.severity == "error" for finding in findings)
    if not findings:
        console.print("nothing is wrong")
    else:
        console.print(f"{errors} errors, {len(findings) - errors} warnings", highlight=False)


def to_values(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return findings as plain values."""
    return {"findings": [asdict(finding) for finding in findings]}
