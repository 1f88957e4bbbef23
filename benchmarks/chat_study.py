"""Fuse chat models on conversations: pairwise and merged, all at once, and fine-tuning alone.

    python -m benchmarks.chat_study --models DIR --out DIR [section.key=value ...]

DIR of --models has `smollm2-135m-instruct`, the target, with its own template, and `gemma-3-270m`,
which gets Gemma's. The third source is `tutor`, a small model with GPT-2's tokenizer, which is
trained here to chat on generated conversations; the fourth is the target's own copy. The corpus has
three domains: word problems (GSM8K), questions of science (ARC, OpenBookQA), and tasks of the kind
that the tutor was trained on. No conversation is in two of: the tutor's training, the corpus, the
held-out part. `rayfuse run` trains the target on all sources at once and on the answers alone (CLM,
which is supervised fine-tuning here); `rayfuse merge` trains a target for each source and merges
them. Everything is stored in --out, so that a killed call resumes; DIR/results.json has both
tables.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
TARGET, SOURCE = "smollm2-135m-instruct", "gemma-3-270m"

GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message.role =="
    " 'assistant' else 'user') + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TUTOR = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}{{ "
    "eos_token if message.role == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

WORDS = """
apple bridge candle desert engine forest garden hammer island jungle kettle ladder mirror
needle orange pencil quarry ribbon silver tunnel umbrella valley window yellow zebra
""".split()  # noqa: SIM905 - as a list it is a line per word

TUTOR_CONVERSATIONS = 12_000
TUTOR_WIDTH, TUTOR_LAYERS, TUTOR_RATE, TUTOR_ROWS = 256, 4, 2e-3, 32

Conversation = dict[str, Any]
"""`id`, `domain` and `messages`."""


def main() -> None:
    """Make the tutor and the texts, run both commands, and write and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat_study")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--conversations", type=int, default=100, help="of each domain")
    parser.add_argument("--held-out", type=int, default=100, help="of each domain")
    parser.add_argument("--tutor-conversations", type=int, default=TUTOR_CONVERSATIONS)
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "tutor" / "model.safetensors").is_file():
        train_tutor(given)
    recipe = given.out / "recipe.yaml"
    if not recipe.is_file():
        write_texts(given)
        recipe.write_text(yaml.safe_dump(make_recipe(given), sort_keys=False))
    _rayfuse("run", recipe, given.overrides)
    merged = json.loads(_rayfuse("merge", recipe, [*given.overrides, "--json"]))
    findings = json.loads((given.out / "run" / "report" / "findings.json").read_text())
    names = ("bits_per_byte", "fused_minus", "signals", "verdict")
    results = {"merge": merged, "run": {name: findings[name] for name in names}}
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def _rayfuse(command: str, recipe: Path, arguments: list[str]) -> str:
    """Run a command as a user does; return what it prints to stdout."""
    words = [sys.executable, "-m", "rayfuse", command, str(recipe), *arguments]
    return subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


def make_recipe(given: argparse.Namespace) -> dict[str, Any]:
    """Make the recipe: recipes/chat.yaml with local models and documents, and sizes for a CPU."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "chat.yaml").read_text())
    out, models = given.out.resolve(), given.models.resolve()
    (out / "gemma.jinja").write_text(GEMMA)
    recipe["storage"] = str(out / "run")
    recipe["corpus"] |= {
        "documents": [{"path": str(out / "corpus.jsonl"), "messages": "messages"}],
        "max_tokens": 512,
        "shard_tokens": 20_000,
    }
    recipe["target"] = {"model": str(models / TARGET)}
    gemma = {"model": str(models / SOURCE), "chat_template": str(out / "gemma.jinja")}
    recipe["sources"] = [
        {"name": "gemma", **gemma},
        {"name": "tutor", "model": str(out / "tutor")},
        {"name": "self", "model": str(models / TARGET)},
    ]
    recipe["capture"]["batch_tokens"] = 2048
    recipe["train"] |= {"rows_per_step": 8, "validate_every_steps": 20}
    recipe["evaluate"] = {
        "documents": [{"path": str(out / "held_out.jsonl"), "messages": "messages"}],
        "batch_tokens": 2048,
    }
    return recipe


def write_texts(given: argparse.Namespace) -> None:
    """Write the corpus and the held-out conversations: as many of each domain.

    Raises:
        ValueError: A domain has too few conversations.
    """
    domains = {
        "math": list(read_problems(given.data / "eval")),
        "science": list(read_questions(given.data / "eval")),
        "tasks": list(generate_tasks(2 * (given.conversations + given.held_out), seed=1)),
    }
    seen = {_identify(one) for one in generate_tasks(given.tutor_conversations, seed=0)}
    domains["tasks"] = [one for one in domains["tasks"] if _identify(one) not in seen]
    for file, begin, end in (
        ("corpus", 0, given.conversations),
        ("held_out", given.conversations, given.conversations + given.held_out),
    ):
        with (given.out / f"{file}.jsonl").open("w", encoding="utf-8") as out:
            for name, found in domains.items():
                if len(found) < end:
                    raise ValueError(f"{name} has {len(found)} conversations, of {end}")
                for one in sorted(found, key=_identify)[begin:end]:
                    out.write(json.dumps(one, ensure_ascii=False) + "\n")


def _identify(conversation: Conversation) -> str:
    """Hash the messages."""
    text = json.dumps(conversation["messages"], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _talk(name: str, domain: str, *texts: str) -> Conversation:
    """Build a conversation from the texts of a user and an assistant in turn."""
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]
    return {"id": name, "domain": domain, "messages": messages}


def read_problems(folder: Path) -> Iterator[Conversation]:
    """Yield GSM8K's problems with their solutions, without the annotations of a calculator."""
    lines = (folder / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    for number, record in enumerate(map(json.loads, lines)):
        steps, _, result = record["answer"].partition("\n#### ")
        while "<<" in steps:
            before, _, rest = steps.partition("<<")
            steps = before + rest.partition(">>")[2]
        answer = f"{steps}\nThe answer is {result}."
        yield _talk(f"gsm8k-{number}", "math", record["question"], answer)


def read_questions(folder: Path) -> Iterator[Conversation]:
    """Yield questions with choices; the answer is the text of the right choice."""
    for file in ("arc/easy.validation", "arc/challenge.validation", "openbookqa/validation"):
        lines = (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        for record in map(json.loads, lines):
            choices = "\n".join(f"- {choice}" for choice in record["choices"])
            right = record["choices"][record["answer"]]
            question = f"{record['question']}\n{choices}"
            yield _talk(record["id"], "science", question, f"The right answer is: {right}")


def generate_tasks(count: int, seed: int) -> Iterator[Conversation]:
    """Yield conversations of two turns about lists of words and lengths of time."""
    rng = random.Random(seed)
    for number in range(count):
        words = rng.sample(WORDS, rng.randint(3, 5))
        hours, minutes = rng.randint(1, 20), rng.randint(1, 59)
        total = 60 * hours + minutes
        if rng.random() < 0.5:
            texts = (
                f"Sort these words: {', '.join(words)}.",
                f"In alphabetical order they are {', '.join(sorted(words))}.",
                "And how many letters has each?",
                "; ".join(f"{word} has {len(word)}" for word in sorted(words)) + ".",
            )
        else:
            texts = (
                f"How many minutes are {hours} hours and {minutes} minutes?",
                f"{hours} hours are {60 * hours} minutes, and {minutes} more make {total} minutes.",
                "And in seconds?",
                f"{total} minutes are {60 * total} seconds.",
            )
        yield _talk(f"task-{seed}-{number}", "tasks", *texts)


def train_tutor(given: argparse.Namespace) -> None:
    """Train a small model to chat: two passes over generated conversations, answers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(given.data / "tokenizers" / "gpt2")
    tokenizer.chat_template = TUTOR
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TUTOR_WIDTH,
        intermediate_size=3 * TUTOR_WIDTH,
        num_hidden_layers=TUTOR_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    rows = [
        tokenizer.apply_chat_template(one["messages"], return_dict=False)
        for one in generate_tasks(given.tutor_conversations, seed=0)
    ] * 2
    random.Random(0).shuffle(rows)
    batches = [rows[at : at + TUTOR_ROWS] for at in range(0, len(rows), TUTOR_ROWS)]
    optimizer = torch.optim.AdamW(model.parameters(), TUTOR_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TUTOR_RATE, len(batches))
    for number, batch in enumerate(batches):
        length = max(map(len, batch))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in batch])
        is_text = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
        labels = torch.where(is_text.bool(), ids, -100)
        loss = model(input_ids=ids, attention_mask=is_text, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % 50 == 0:
            print(f"tutor: step {number} of {len(batches)}, loss {loss:.3f}", file=sys.stderr)
    model.save_pretrained(given.out / "tutor")
    tokenizer.save_pretrained(given.out / "tutor")


if __name__ == "__main__":
    main()
