"""Tasks that generate text, each model asked in its own chat template."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from rayfuse.config.base import UserError
from rayfuse.evaluate.bits_per_byte import load_scored_model
from rayfuse.evaluate.lm_eval_model import TextLM
from rayfuse.models.chat import ChatFormat, Message, load_chat_format
from tests.chat.templates import FAMILIES, save_family
from tests.fakes import save_model

QUESTION = "What is 3 plus 4?\nAnswer:"


def make_lm(name: str, folder: Path, *, context_tokens: int = 200) -> tuple[TextLM, ChatFormat]:
    """Write a random model of a family, and open it for tasks."""
    settings = save_family(name, folder)
    chat = load_chat_format(settings)
    kind = "llama" if FAMILIES[name].is_sentencepiece else "gpt_neox"
    save_model(kind, chat.tokenizer.vocab_size, folder)
    lm = TextLM(
        load_scored_model(settings),
        chat.tokenizer,
        batch_tokens=500,
        context_tokens=context_tokens,
        chat=chat,
    )
    return lm, chat


def ask(lm: TextLM, question: str, **settings: object) -> str:
    request = Instance("generate_until", {}, (question, {"max_gen_toks": 12} | settings), 0)
    return lm.generate_until([request])[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_what_the_model_generates_after_the_rendered_question(name, tmp_path):
    lm, chat = make_lm(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([chat.encode_prompt([Message("user", QUESTION)]).tolist()])
    ends = [chat.end_id, chat.tokenizer.eos_id]
    written = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=ends)
    ids = written[0, prompt.shape[1] :].tolist()
    text = b"".join(chat.tokenizer.token_bytes[i] or b"" for i in ids if i not in ends)
    assert ask(lm, QUESTION).encode() == text.decode(errors="replace").removeprefix(" ").encode()


def test_the_end_of_a_turn_ends_an_answer(tmp_path):
    lm, chat = make_lm("chatml", tmp_path)
    assert chat.end_id is not None
    model = lm.lm.model
    head = model.get_output_embeddings()
    torch.nn.init.zeros_(head.weight)
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[chat.end_id] = 1.0  # the likeliest token after any text
    assert ask(lm, QUESTION) == ""
    head.bias.data[chat.tokenizer.encode(["a"])[0][0]] = 2.0
    assert ask(lm, QUESTION) == "a" * 12


def test_a_question_that_is_too_long_loses_its_beginning_and_no_part_of_the_template(tmp_path):
    lm, _ = make_lm("llama-3", tmp_path, context_tokens=64)
    question = " ".join(f"word{number}" for number in range(100))
    prompt = lm._truncate_prompt(question, {"max_gen_toks": 12})
    assert 40 < len(prompt) <= 52
    text = AutoTokenizer.from_pretrained(tmp_path).decode(prompt)
    assert text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>")
    assert text.endswith("word99<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert "word0 " not in text
    with pytest.raises(UserError, match="leaves no room for a message"):
        lm._truncate_prompt(question, {"max_gen_toks": 60})


def test_a_template_that_refuses_the_question_is_named(tmp_path):
    guard = "{% if '3 plus' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    settings = save_family("chatml", tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(guard + template.read_text())
    chat = load_chat_format(settings)
    save_model("gpt_neox", chat.tokenizer.vocab_size, tmp_path)
    lm = TextLM(load_scored_model(settings), chat.tokenizer, batch_tokens=500, chat=chat)
    with pytest.raises(UserError, match=r"in its chat template: its template refuses: no"):
        ask(lm, QUESTION)


@pytest.mark.parametrize("name", ["llama-2", "gemma", "chatml"])
def test_truncation_ends_for_text_that_begins_with_a_lone_space_token(name, tmp_path):
    lm, _ = make_lm(name, tmp_path, context_tokens=100)
    prompt = lm._truncate_prompt("日本語の質問です。" * 15, {"max_gen_toks": 12})
    assert 60 < len(prompt) <= 88
