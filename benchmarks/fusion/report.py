"""RESULTS.md: the setting, a table per question, and the computing time."""

from pathlib import Path

from benchmarks.fusion.findings import Findings, write_numbers
from benchmarks.fusion.plan import CLM, FUSED, TUNING
from benchmarks.fusion.plots import NO_VARIANTS, draw_plots
from benchmarks.fusion.scales import DOMAINS, OWN_SHARE, SOURCES, TARGET
from benchmarks.fusion.tables import (
    NOTHING,
    order_models,
    to_table,
    write_against,
    write_domains,
    write_multiple,
    write_scores,
    write_variants,
    write_wins,
)
from rayfuse.evaluate.scores import ALL

MINUTES = {"tiny": 2, "cpu": 90, "gpu": 25}


def write_report(findings: Findings, out: Path) -> None:
    """Write RESULTS.md, its plots and numbers.json into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_numbers(findings, out / "numbers.json")
    plots = draw_plots(findings)
    for name, data in plots.items():
        (out / name).write_bytes(data)
    sections = [
        _describe_study(findings),
        _answer_first(findings),
        _answer_tokens(findings),
        *_answer_variants(findings),
        _answer_strong_and_bad(findings),
        _describe_choices(findings),
        _describe_cost(findings),
    ]
    text = "\n\n".join(sections) + "\n"
    for name in [name for name in plots if f"({name})" not in text]:
        text += f"\n![{name}]({name})\n"
    (out / "RESULTS.md").write_text(text, encoding="utf-8")


def _describe_study(findings: Findings) -> str:
    scale = findings.scale
    corpora = findings.needs.get("corpus", [])
    sizes = ", ".join(f"{c['tokens']:,}" for c in corpora if c["name"].startswith("1x"))
    models = findings.needs.get("model", [])
    lines = [
        [
            make.name,
            make.family,
            make.tokenizer,
            " + ".join(make.own_domains) or "all evenly",
            f"{size.width} x {size.layers}",
            f"{next((m['parameters'] for m in models if m['name'].startswith(make.name)), 0):,}",
            f"{size.tokens:,}",
        ]
        for make, size in [*((make, scale.source) for make in SOURCES), (TARGET, scale.target)]
    ]
    head = ["model", "family", "tokenizer", "own domains", "width x layers", "parameters", "tokens"]
    done = sorted({seed for records in findings.questions["1"].values() for seed in records})
    parts = [
        f"# The fusion study, scale `{scale.name}`",
        f"`python -m benchmarks.fusion --scale {scale.name} --out DIR` computes everything from "
        "the text and the tokenizers of `shared/data`, and resumes after an interruption. All "
        "scores are bits per byte: lower is better.",
    ]
    if findings.num_missing:
        parts.append(
            f"**Partial: {findings.num_missing} units of work are missing.** The column `seeds` is "
            f"the number of finished seeds, of {len(findings.seeds)} ({', '.join(map(str, done))} "
            "have started); with one seed an interval covers the documents only."
        )
    parts += [
        "## Setting",
        to_table(head, lines),
        _describe_models(findings, sizes),
        "Every variant continues the target for one epoch of these rows in the same order, with "
        f"{scale.rows_per_step} rows per step, rayfuse's own batches and loss, AdamW and a cosine "
        f"schedule with a peak of {scale.rate:g}. A seed decides the documents of each model, the "
        "initial weights and the order.",
        _describe_held_out(findings),
        "Intervals are 95 % confidence intervals over documents and seeds (see `intervals.py`), "
        "in bold where they exclude zero.",
    ]
    return "\n\n".join(parts)


def _describe_models(findings: Findings, sizes: str) -> str:
    scale = findings.scale
    return (
        f"{OWN_SHARE:.0%} of a source's pre-training text is from its own domains, the rest is "
        "spread evenly over the others. Its real tokenizer is truncated to the first merges that "
        f"make {scale.vocab_size:,} entries, special tokens, bytes and (SentencePiece) the most "
        "frequent characters included; normalizer, pre-tokenizer and order of merges are kept. A "
        "head over 32,000 to 50,000 tokens would make most of the parameters of such a model. All "
        "models are pre-trained on one half of the training documents (by the hash of id and "
        f"seed), in rows of {scale.max_tokens} tokens, with AdamW and a cosine schedule with a "
        f"peak of {scale.pretrain_rate:g}. Fusion uses documents of the other half, which no model "
        f"has seen: {scale.corpus_bytes:,} bytes per domain, at most {scale.corpus_chars:,} "
        f"characters per document ({sizes} target tokens by seed)."
    )


def _describe_held_out(findings: Findings) -> str:
    scale = findings.scale
    counts = {
        half: ", ".join(
            f"{domain} {sum(own == domain for _, own, _ in documents)}" for domain in DOMAINS
        )
        for half, documents in findings.documents.items()
    }
    return (
        "The held-out text is the `valid` parts: the first "
        f"{scale.held_out_chars:,} characters of each document, at most "
        f"{scale.held_out_documents} documents per domain, in two halves. One half is for "
        "selection, the other for every figure here. Reported documents: "
        f"{counts['reported']}."
    )


def _answer_first(findings: Findings) -> str:
    variants = findings.questions["1"]
    claims = "\n".join(f"- {claim}" for claim in write_wins(findings))
    parts = ["## 1. Fused against everything", claims]
    if FUSED not in variants or CLM not in variants:
        return "\n\n".join(parts)
    models = order_models(findings)
    others = {name: records for name, records in models.items() if name != FUSED}
    parts += [
        write_scores(findings, models),
        "Fused minus each other, over all text:",
        write_against(findings, variants[FUSED], others),
        "Fused minus CLM and minus the target, by domain:",
        write_domains(
            findings,
            variants[FUSED],
            {name: models[name] for name in (CLM, "target", "ensemble") if name in models},
        ),
        "![bits per byte of every model](models.png)",
        "![fused minus CLM by domain](domains.png)",
    ]
    experts = findings.questions["1b"]
    if "fused experts" in experts:
        rest = {name: records for name, records in experts.items() if name != "fused experts"}
        parts += [
            "### Models of one shape: weight merging",
            "Three experts continue the target on the pre-training text of their own domains "
            f"({findings.scale.expert_tokens:,} tokens each). Here they are the sources, as in the "
            "paper's table 7. The sources above have other shapes and tokenizers than the target, "
            "so their weights cannot be merged.",
            write_scores(findings, experts),
            "Fused from the experts minus each other, over all text:",
            write_against(findings, experts["fused experts"], rest),
        ]
    return "\n\n".join(parts)


def _answer_tokens(findings: Findings) -> str:
    parts = ["## 2. Tokens that CLM needs", write_multiple(findings)]
    variants = findings.questions["2"]
    if any(name.endswith("x") for name in variants):
        parts += [write_scores(findings, variants), "![CLM's tokens](tokens.png)"]
    return "\n\n".join(parts)


def _answer_variants(findings: Findings) -> list[str]:
    titles = {
        "3": ("Number of sources", ""),
        "4": (
            "Alignment",
            "The paper preset is top-10 renormalized, `min_edit_distance`, a source selected per "
            "row by nats per token, and lambda 0.9, with the same three sources. Its off-by-one is "
            "reproduced by the study alone (`published.py`).",
        ),
        "5": ("Source selection", ""),
        "6": ("Entries stored per distribution", _describe_bytes(findings)),
        "7": ("The loss", ""),
    }
    plots = {"6": "![records](top_k.png)", "7": "![lambda](lambda.png)"}
    return [
        "\n\n".join(
            part
            for part in (
                f"## {question}. {title}",
                note,
                write_variants(findings, findings.questions[question])
                if findings.questions[question]
                else NOTHING,
                plots.get(question, ""),
            )
            if part
        )
        for question, (title, note) in titles.items()
    ]


def _describe_bytes(findings: Findings) -> str:
    sizes: dict[str, list[float]] = {}
    for record in findings.needs.get("captured", []):
        for name, stored in record["records"].items():
            sizes.setdefault(name, []).append(stored["bytes_per_token"])
    means = {name: sum(of_record) / len(of_record) for name, of_record in sizes.items()}
    listed = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    return (
        f"Stored bytes per source token, all columns, mean over sources and seeds: {listed}. "
        "`sampled-0+M` keeps M draws and nothing else, `sampled-K+M` the top K tokens and M draws "
        "from the rest. Full distributions have all source tokens; they are computed while "
        "training reads its rows, and never stored."
    )


def _answer_strong_and_bad(findings: Findings) -> str:
    variants = findings.questions["8"]
    parts = ["## 8. Strong sources and an untrained one"]
    weak_clm, weak = variants.get("weak target: CLM"), variants.get("weak target: fused")
    if weak_clm is not None and weak is not None:
        scores = findings.score(variants["weak target"])
        parts += [
            f"A target with only {findings.scale.weak_target_tokens:,} tokens of pre-training "
            f"({scores[ALL]:.4f} bits per byte at the start), which every source is better than: "
            f"fused {findings.score(weak)[ALL]:.4f}, CLM {findings.score(weak_clm)[ALL]:.4f}.",
            write_domains(findings, weak, {"its CLM": weak_clm}),
        ]
    shown = {name: records for name, records in variants.items() if name not in NO_VARIANTS}
    parts += [
        "A source with random weights beside the three, and alone; both without and with "
        "`fuse.skip_noise`, which is on by default and excludes it:",
        write_variants(findings, shown) if shown else NOTHING,
        *_describe_noise(findings),
        "![all variants](variants.png)",
    ]
    return "\n\n".join(parts)


def _describe_noise(findings: Findings) -> list[str]:
    variants = findings.questions["8"]
    clm = variants.get(CLM)
    lines: list[str] = []
    noisy = ("and an untrained source", "an untrained source alone")
    for name in (*noisy, *(f"{variant}, skip_noise" for variant in noisy)):
        if clm is not None and name in variants:
            share = findings.compare(variants[name], clm)[ALL].value / findings.score(clm)[ALL]
            bad = name.removeprefix("and ")
            beside = "the three sources and " if bad != name else ""
            lines.append(f"Fused with {beside}{bad}: {share:+.2%} of CLM's bits per byte.")
    return lines


def _describe_choices(findings: Findings) -> str:
    parts = [
        "## Selection of the learning rate",
        "The peak learning rate of continued training is the best one for CLM on the selection "
        f"half of seed {findings.scale.seeds[0]}; fusion uses the same. Sizes are limited by "
        "computing time.",
    ]
    lines = [
        [name, f"{findings.score(records, 'selection')[ALL]:.4f}"]
        for name, records in findings.questions[TUNING].items()
    ]
    return "\n\n".join([*parts, to_table(["run", "selection half, all"], lines)])


def _describe_cost(findings: Findings) -> str:
    total = sum(findings.cpu_seconds.values())
    lines = [
        [kind, str(len(findings.needs[kind])), f"{seconds:,.0f}", f"{seconds / total:.0%}"]
        for kind, seconds in sorted(findings.cpu_seconds.items(), key=lambda item: -item[1])
    ]
    lines.append(["all", str(sum(map(len, findings.needs.values()))), f"{total:,.0f}", "100%"])
    text = (
        "Seconds of CPU time of each unit, with one thread. The scale is meant for "
        f"{MINUTES[findings.scale.name]} minutes"
    )
    if findings.scale.name != "gpu":
        text += f" on 2 cores, and took {total / 120:.0f}"
    return "\n\n".join(
        ["## Computing time", text + ".", to_table(["kind of unit", "units", "s", "share"], lines)]
    )
