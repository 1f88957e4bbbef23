"""RESULTS.md: what was made how, each question's table, and what it took."""

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
    corpora = [each for each in findings.needs.get("corpus", []) if each["name"].startswith("1x")]
    sizes = ", ".join(f"{each['tokens']:,}" for each in corpora)
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
        f"`python -m benchmarks.fusion --scale {scale.name} --out DIR` makes all of this from the "
        "text and the tokenizers of `shared/data`, and goes on where it was stopped. Bits per byte "
        "throughout: lower is better.",
    ]
    if findings.num_missing:
        parts.append(
            f"**Partial: {findings.num_missing} units of work are not done yet.** The column "
            f"`seeds` says how many of {len(findings.seeds)} seeds ({', '.join(map(str, done))} "
            "begun) each line rests on; with one, an interval is that of the documents alone."
        )
    parts += [
        "## What was made",
        to_table(head, lines),
        f"A source has {OWN_SHARE:.0%} of its text from its own domains and the rest evenly from "
        f"the others. Its real tokenizer is cut to the first merges that make {scale.vocab_size:,} "
        "entries, specials, bytes and (SentencePiece) the commonest characters included: same "
        "normaliser, rule for words and order of merges; a head over 32,000 to 50,000 tokens would "
        "be most of such a model. All models are pre-trained on one half of the training documents "
        f"(by the hash of id and seed), rows of {scale.max_tokens} tokens, AdamW, cosine, peak "
        f"{scale.pretrain_rate:g}. Fusion has documents of the other half, which no model has "
        f"seen: {scale.corpus_bytes:,} bytes of each domain, at most {scale.corpus_chars:,} "
        f"characters of a document ({sizes} target tokens by seed).",
        "Every variant is the target continued for one epoch of these rows in the same order, "
        f"{scale.rows_per_step} rows a step, by rayfuse's own feed and loss, AdamW, cosine, the "
        f"same peak of {scale.rate:g}. A seed decides which documents train whom, all weights and "
        "the order.",
        _describe_held_out(findings),
        "Intervals are of 95 %, over documents and seeds (`intervals.py` says how); in bold where "
        "they exclude zero.",
    ]
    return "\n\n".join(parts)


def _describe_held_out(findings: Findings) -> str:
    scale = findings.scale
    counts = {
        half: ", ".join(
            f"{domain} {sum(each[1] == domain for each in documents)}" for domain in DOMAINS
        )
        for half, documents in findings.documents.items()
    }
    return (
        "Held out are the `valid` parts, of each document the first "
        f"{scale.held_out_chars:,} characters, {scale.held_out_documents} documents of a domain at "
        "most, in two halves: one to choose on, the other for every figure here. Documents "
        f"reported: {counts['reported']}."
    )


def _answer_first(findings: Findings) -> str:
    variants = findings.questions["1"]
    parts = ["## 1. Fused against everything", *(f"- {each}" for each in write_wins(findings))]
    parts = [parts[0], "\n".join(parts[1:])]
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
        rest = {name: each for name, each in experts.items() if name != "fused experts"}
        parts += [
            "### Models of one shape: weight merging",
            "Three experts continue the target on their own domains' pre-training text "
            f"({findings.scale.expert_tokens:,} tokens each); here the sources are they, as in the "
            "paper's table 7. The sources above have other shapes and tokenizers than the target: "
            "their weights cannot be merged.",
            write_scores(findings, experts),
            "Fused from the experts minus each other, over all text:",
            write_against(findings, experts["fused experts"], rest),
        ]
    return "\n\n".join(parts)


def _answer_tokens(findings: Findings) -> str:
    parts = ["## 2. How many tokens CLM needs", write_multiple(findings)]
    variants = findings.questions["2"]
    if any(name.endswith("x") for name in variants):
        parts += [write_scores(findings, variants), "![CLM's tokens](tokens.png)"]
    return "\n\n".join(parts)


def _answer_variants(findings: Findings) -> list[str]:
    titles = {
        "3": ("Number of sources", ""),
        "4": (
            "Alignment",
            "The paper preset is top-10 renormalised, `min_edit_distance`, choice per row by nats "
            "per token, lambda 0.9, of the same three sources. Its off-by-one is made by the study "
            "alone (`published.py`).",
        ),
        "5": ("Which source is heard", ""),
        "6": ("What is kept of each distribution", _describe_bytes(findings)),
        "7": ("The loss", ""),
    }
    plots = {"6": "![records](top_k.png)", "7": "![lambda](lambda.png)"}
    return [
        "\n\n".join(
            each
            for each in (
                f"## {question}. {title}",
                note,
                write_variants(findings, findings.questions[question])
                if findings.questions[question]
                else NOTHING,
                plots.get(question, ""),
            )
            if each
        )
        for question, (title, note) in titles.items()
    ]


def _describe_bytes(findings: Findings) -> str:
    sizes: dict[str, list[float]] = {}
    for record in findings.needs.get("captured", []):
        for name, each in record["records"].items():
            sizes.setdefault(name, []).append(each["bytes_per_token"])
    means = {name: sum(each) / len(each) for name, each in sizes.items()}
    listed = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    return (
        f"Stored bytes a source token, all columns, the mean over sources and seeds: {listed}. "
        "`sampled-0+M` keeps M draws and nothing else, `sampled-K+M` the K likeliest tokens and M "
        "draws from the rest. Full distributions are of all source tokens, computed as training "
        "reads and never stored."
    )


def _answer_strong_and_bad(findings: Findings) -> str:
    variants = findings.questions["8"]
    parts = ["## 8. Strong sources, and a bad one"]
    weak_clm, weak = variants.get("weak target: CLM"), variants.get("weak target: fused")
    if weak_clm is not None and weak is not None:
        scores = findings.score(variants["weak target"])
        parts += [
            f"A target that has seen only {findings.scale.weak_target_tokens:,} tokens "
            f"({scores[ALL]:.4f} bits per byte before), of which every source knows more: fused "
            f"{findings.score(weak)[ALL]:.4f}, CLM {findings.score(weak_clm)[ALL]:.4f}.",
            write_domains(findings, weak, {"its CLM": weak_clm}),
        ]
    shown = {name: each for name, each in variants.items() if name not in NO_VARIANTS}
    parts += [
        "A source with random weights beside the three, and alone; heard all the same, and left "
        "out, as `fuse.skip_noise` does by default:",
        write_variants(findings, shown) if shown else NOTHING,
        *_describe_noise(findings),
        "![all variants](variants.png)",
    ]
    return "\n\n".join(parts)


def _describe_noise(findings: Findings) -> list[str]:
    variants = findings.questions["8"]
    clm = variants.get(CLM)
    lines: list[str] = []
    heard = ("and an untrained source", "an untrained source alone")
    for name in (*heard, *(f"{each}, left out" for each in heard)):
        if clm is not None and name in variants:
            cost = findings.compare(variants[name], clm)[ALL].value
            share = cost / findings.score(clm)[ALL]
            bad = name.removeprefix("and ")
            beside = "the three sources and " if bad != name else ""
            lines.append(f"Fused with {beside}{bad}: {share:+.2%} of CLM's bits per byte.")
    return lines


def _describe_choices(findings: Findings) -> str:
    parts = [
        "## How it was chosen",
        "The peak learning rate of continued training is the best one for CLM on the selection "
        "half of seed "
        f"{findings.scale.seeds[0]}; fusion has the same. Sizes are what the time allows.",
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
        for kind, seconds in sorted(findings.cpu_seconds.items(), key=lambda each: -each[1])
    ]
    lines.append(["all", str(sum(map(len, findings.needs.values()))), f"{total:,.0f}", "100%"])
    text = (
        "Seconds of processor time, one thread each, as measured by every unit itself. The scale "
        f"is meant for {MINUTES[findings.scale.name]} minutes"
    )
    if findings.scale.name != "gpu":
        text += f" on 2 cores: {total / 120:.0f} minutes of both are spent"
    return "\n\n".join(
        ["## What it took", text + ".", to_table(["kind of unit", "units", "s", "share"], lines)]
    )
