"""The conversations of the chat study: right answers, three domains, and no text in two parts."""

import argparse
import json
import re
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from benchmarks import chat_study


def test_generated_tasks_have_right_answers():
    kinds = set()
    for talk in chat_study.generate_tasks(200, seed=3):
        asked, answer, asked_next, answer_next = [each["content"] for each in talk["messages"]]
        kinds.add(asked_next)
        if asked_next == "And in seconds?":
            hours, minutes = map(int, re.findall(r"\d+", asked))
            assert re.findall(r"\d+", answer)[-1] == str(60 * hours + minutes)
            assert re.findall(r"\d+", answer_next)[-1] == str(3600 * hours + 60 * minutes)
        else:
            words = asked.removeprefix("Sort these words: ").removesuffix(".").split(", ")
            assert answer.endswith(f"are {', '.join(sorted(words))}.")
            counts = dict(re.findall(r"(\w+) has (\d+)", answer_next))
            assert counts == {word: str(len(word)) for word in words}
    assert len(kinds) == 2


def test_texts_have_all_domains_and_none_is_in_two_parts(shared_data: Path, tmp_path: Path):
    given = argparse.Namespace(
        out=tmp_path, data=shared_data, conversations=60, held_out=40, tutor_conversations=3000
    )
    chat_study.write_texts(given)
    parts = {
        name: list(map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines()))
        for name in ("corpus", "held_out")
    }
    for name, count in (("corpus", 60), ("held_out", 40)):
        domains = [talk["domain"] for talk in parts[name]]
        assert {domain: domains.count(domain) for domain in domains} == dict.fromkeys(
            ("math", "science", "tasks"), count
        )
    texts = {
        name: {json.dumps(talk["messages"]) for talk in talks} for name, talks in parts.items()
    }
    tutor = {json.dumps(talk["messages"]) for talk in chat_study.generate_tasks(3000, seed=0)}
    assert not texts["corpus"] & texts["held_out"]
    assert not tutor & (texts["corpus"] | texts["held_out"])
    assert "<<" not in (tmp_path / "corpus.jsonl").read_text()
    with pytest.raises(ValueError, match="math has 1319 conversations, of 1340"):
        given.held_out = 1280
        chat_study.write_texts(given)


def test_the_templates_are_those_of_gemma_and_zephyr():
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    shown = [
        ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(messages=talk, bos_token="<bos>", eos_token="</s>")
        for template in (chat_study.GEMMA, chat_study.TUTOR)
    ]
    assert shown == [
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n",
        "<|user|>\nHi\n<|assistant|>\nYes</s>\n",
    ]
