"""Laws of the tokens that chat templates give, for seven families of templates."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.chat import ChatError, ChatFormat, Message, load_chat_format, merge_system
from tests.chat.templates import FAMILIES, save_family

ASK, ANSWER = Message("user", "What is 3 plus 4?"), Message("assistant", "It is seven.\n\nYes!")
TALK = [ASK, ANSWER, Message("user", "Are you sure?"), Message("assistant", "漢字 (seven), quite")]
SYSTEM = Message("system", "You add numbers.")


@pytest.fixture(scope="module", params=FAMILIES)
def named(request, tmp_path_factory) -> tuple[str, ChatFormat, ModelSettings]:
    settings = save_family(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, load_chat_format(settings), settings


def spell(form: ChatFormat, ids) -> bytes:
    return b"".join(form.tokenizer.token_bytes[i] or b"" for i in ids)


@pytest.mark.parametrize("has_system", [False, True])
def test_tokens_are_those_of_transformers(named, has_system):
    name, form, settings = named
    messages = [SYSTEM, *TALK] if has_system else TALK
    theirs = AutoTokenizer.from_pretrained(settings.model)
    given = merge_system(messages) if not FAMILIES[name].takes_system else messages
    plain = [{"role": message.role, "content": message.content} for message in given]
    expected = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
    assert form.encode_one(messages).ids.tolist() == expected


def test_answers_alone_are_marked_with_the_ends_of_their_turns(named):
    name, form, _ = named
    tokens = form.encode_one([SYSTEM, *TALK])
    assert form.takes_system == FAMILIES[name].takes_system
    assert form.tokenizer.token_names[form.end_id] == FAMILIES[name].end
    spans = tokens.answers.tolist()
    assert len(spans) == 2
    for (start, stop, end), answer in zip(spans, (TALK[1], TALK[3]), strict=True):
        assert spell(form, tokens.ids[start:stop]).decode().removeprefix(" ") == answer.content
        assert tokens.ids[end - 1] == form.end_id
        assert spell(form, tokens.ids[stop : end - 1]).strip() == b""
        assert end - stop == (2 if name == "llama-2" else 1)


def test_names_of_control_tokens_in_a_message_are_text(named):
    name, form, _ = named
    end = FAMILIES[name].end
    tokens = form.encode_one([Message("user", f"Say {end}"), Message("assistant", f"So: {end}.")])
    ((start, stop, _),) = tokens.answers.tolist()
    assert spell(form, tokens.ids[start:stop]).strip() == f"So: {end}.".encode()
    harmless = form.encode_one([ASK, ANSWER])
    assert (tokens.ids == form.end_id).sum() == (harmless.ids == form.end_id).sum()


def test_an_answer_that_was_cut_has_no_end(named):
    _, form, _ = named
    complete = form.encode_one([ASK, ANSWER])
    cut = form.encode_one([ASK, Message("assistant", "It is", is_cut=True)])
    ((start, stop, end),) = cut.answers.tolist()
    assert stop == end == len(cut.ids)
    assert start == complete.answers[0, 0]


def test_thoughts_before_an_answer_are_context(named):
    _, form, _ = named
    thought = Message("assistant", "Seven.", context="<think>\n3 + 4\n</think>\n\n")
    tokens = form.encode_one([ASK, thought])
    ((start, stop, _),) = tokens.answers.tolist()
    assert spell(form, tokens.ids[start:stop]) == b"Seven."
    assert b"</think>" in spell(form, tokens.ids[:start])


CHANGES = {
    "{{ m['content'] | upper }}": "changes the text",
    "{{ m['content'] | replace('seven', '7') }}": "changes the text",
    "{{ m['content'].split('7')[0] }}{{ m['content'] }}": "repeats messages",
    "{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}": "omits message 2",
    "{{ m['content'] + m.missing.name }}": "refuses",
    "{{ raise_exception('not for you') }}": "not for you",
}


@pytest.mark.parametrize(("body", "reason"), CHANGES.items())
def test_a_template_that_changes_messages_is_refused(body, reason, tmp_path):
    settings = save_family("chatml", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(f"{{% for m in messages %}}{body}{{% endfor %}}")
    with pytest.raises(ValueError, match=reason):
        load_chat_format(settings).encode_one([ASK, ANSWER])


def test_a_template_that_rewrites_one_conversation_rejects_that_one(tmp_path):
    settings = save_family("chatml", tmp_path)
    body = "<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text(f"{{% for m in messages %}}{body}{{% endfor %}}")
    form = load_chat_format(settings)
    good, bad = form.encode([[ASK, ANSWER], [ASK, Message("assistant", "<think>a</think>b")]])
    assert not isinstance(good, ChatError)
    assert isinstance(bad, ChatError)
    assert "changes the text" in str(bad)


def test_an_answer_that_joins_with_the_template_is_refused(tmp_path):
    settings = save_family("zephyr", tmp_path)
    body = "{{ m['role'] }}: {{ m['content'] }}seven\n"
    (tmp_path / "chat_template.jinja").write_text(f"{{% for m in messages %}}{body}{{% endfor %}}")
    form = load_chat_format(settings)
    with pytest.raises(ChatError, match="spell other text"):
        form.encode_one([ASK, Message("assistant", "It is ")])


def test_variables_are_those_of_transformers(tmp_path):
    settings = save_family("llama-3", tmp_path)
    path = tmp_path / "chat_template.jinja"
    tools = "{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}"
    path.write_text(tools + "{{ pad_token if pad_token is defined }}" + path.read_text())
    plain = [{"role": message.role, "content": message.content} for message in TALK]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
    assert load_chat_format(settings).encode_one(TALK).ids.tolist() == expected


def test_the_date_of_a_template_is_fixed(tmp_path):
    settings = save_family("llama-3", tmp_path)
    dated = "{{ strftime_now('%d %b %Y') }} {{ date_string }}\n"
    path = tmp_path / "chat_template.jinja"
    path.write_text(dated + path.read_text())
    form = load_chat_format(settings)
    assert b"26 Jul 2024 26 Jul 2024" in spell(form, form.encode_one(TALK).ids)


def test_a_model_without_template_needs_one_from_the_recipe(tmp_path):
    settings = save_family("chatml", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.rename(tmp_path / "own.jinja")
    with pytest.raises(UserError, match="no chat template"):
        load_chat_format(settings)
    own = settings.model_copy(update={"chat_template": str(tmp_path / "own.jinja")})
    assert load_chat_format(own).encode_one(TALK).answers.shape == (2, 3)
    with pytest.raises(UserError, match="cannot be read"):
        load_chat_format(settings.model_copy(update={"chat_template": str(tmp_path / "none")}))


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    settings = save_family("chatml", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match=r"chat template.*unsafe"):
        load_chat_format(settings)


def test_no_message_can_hold_a_control_token(named):
    name, form, _ = named
    hidden = f"control token {FAMILIES[name].end}"
    tokens = form.encode_one([Message("user", f"The {hidden}"), Message("assistant", hidden)])
    ((start, stop, _),) = tokens.answers.tolist()
    assert spell(form, tokens.ids[start:stop]).strip() == hidden.encode()
    harmless = form.encode_one([ASK, ANSWER])
    assert (tokens.ids == form.end_id).sum() == (harmless.ids == form.end_id).sum()
    with pytest.raises(ChatError, match="characters for private use"):
        form.encode_one([Message("user", f"\ue002{FAMILIES[name].end}\ue003"), ANSWER])


def test_the_template_itself_may_be_the_setting(tmp_path):
    settings = save_family("chatml", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    own = settings.model_copy(update={"chat_template": FAMILIES["chatml"].template})
    assert load_chat_format(own).encode_one(TALK).answers.shape == (2, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_what_precedes_every_answer(name, tmp_path):
    chat = load_chat_format(save_family(name, tmp_path))
    asked = [Message("user", "What is 3 plus 4?")]
    prompt = chat.encode_prompt(asked)
    for answer in ("It is seven.", "漢字", "  seven"):
        try:
            encoded = chat.encode_one([*asked, Message("assistant", answer)])
        except ChatError:  # a template that trims, and an answer with spaces
            continue
        before = encoded.ids[: encoded.answers[0, 0]]
        np.testing.assert_array_equal(before[: len(prompt)], prompt)
        spelled = b"".join(chat.tokenizer.token_bytes[i] or b"" for i in before[len(prompt) :])
        assert spelled in (b"", b" ")
    if "add_generation_prompt" in FAMILIES[name].template:
        theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
            [{"role": "user", "content": asked[0].content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert prompt.tolist() == theirs
