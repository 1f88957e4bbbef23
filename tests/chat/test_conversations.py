"""Conversations in the forms of data sets, malformed ones among them, and their rows."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfuse.config.corpus import CorpusSettings, DocumentsSettings
from rayfuse.corpus.conversations import parse_messages
from rayfuse.corpus.documents import Document, read_documents
from rayfuse.corpus.shards import Part, batch_documents, build_chat_rows
from rayfuse.corpus.split import find_fault
from rayfuse.models.chat import ChatFormat, Message
from rayfuse.run.inputs import list_inputs
from rayfuse.storage.chat_columns import read_answers, read_messages
from rayfuse.storage.codec import flatten_column
from tests.chat.templates import load_family

ASK, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
PLAIN = (Message("user", "2 + 2?"), Message("assistant", "4"))


@pytest.mark.parametrize(
    "value",
    [
        [ASK, ANSWER],
        [{"from": "human", "value": " 2 + 2?\n"}, {"from": "gpt", "value": "4 "}],
        ["2 + 2?", "4"],
        json.dumps([ASK, ANSWER]),
        [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, ANSWER],
        [ASK, ANSWER, {"role": "user", "content": "Thanks"}],  # no answer: nothing to learn
    ],
)
def test_the_usual_forms_are_one_conversation(value):
    assert parse_messages(value, "keep") == PLAIN


def test_messages_of_one_role_are_joined_and_tools_are_text():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = parse_messages(
        [
            {"role": "developer", "content": "Use tools."},
            ASK,
            {"role": "user", "content": "Please."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            ANSWER,
        ],
        "keep",
    )
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
    assert messages == (
        Message("system", "Use tools."),
        Message("user", "2 + 2?\n\nPlease."),
        Message("assistant", written),
        Message("user", "<tool_response>\n4\n</tool_response>"),
        Message("assistant", "4"),
    )


def test_arguments_of_calls_are_decoded_and_odd_values_refused():
    function = {"name": "add", "arguments": '{"a": 2}'}
    answer = {"role": "assistant", "tool_calls": [{"function": function}]}
    (_, message) = parse_messages([ASK, answer], "keep")
    assert message.content == ('<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>')
    with pytest.raises(ValueError, match="tool_calls of message 2 are no JSON values"):
        parse_messages([ASK, answer | {"tool_calls": [{"function": {"name": b"x"}}]}], "keep")


def test_empty_system_messages_are_none_and_leading_ones_are_joined():
    assert parse_messages([{"role": "system", "content": " "}, ASK, ANSWER], "keep") == PLAIN
    both = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}]
    assert parse_messages([*both, ASK, ANSWER], "keep")[0] == Message("system", "A\n\nB")


def test_thoughts_without_a_first_tag_and_between_joined_answers_are_no_answer():
    bare = {"role": "assistant", "content": "2 and 2\n</think>\n\n4"}
    assert parse_messages([ASK, bare], "drop") == PLAIN
    second = {"role": "assistant", "content": "<think>sure?</think>Yes."}
    joined = parse_messages([ASK, ANSWER, second], "context")
    assert joined[1] == Message("assistant", "4\n\nYes.")


def test_a_lone_surrogate_in_a_prompt_costs_its_conversation(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(write({"role": "user", "content": "hi \ud83d"}, ANSWER))
    (document,) = read_file(path)
    assert find_fault(document, 1000) == "invalid UTF-8: lone surrogate"


def test_prompts_count_in_the_size_of_a_shard():
    talk = (Message("user", "x" * 90), Message("assistant", "Yes."))
    documents = [Document(f"d{number}", "", "Yes.", messages=talk) for number in range(10)]
    part = Part(0.0, takes_held_out=False)
    batches = list(batch_documents(documents, part, shard_bytes=200, max_document_bytes=1000))
    assert [len(batch.documents) for batch in batches] == [3, 3, 3, 1]
    assert find_fault(documents[0], 50) == (
        "over-long: 94 characters, corpus.max_document_bytes is 50"
    )


THOUGHT = "<think>\n2 and 2\n</think>\n\n"


@pytest.mark.parametrize(
    "answer", [{"content": THOUGHT + "4"}, {"reasoning_content": "2 and 2", "content": "4"}]
)
@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("keep", Message("assistant", THOUGHT + "4")),
        ("drop", Message("assistant", "4")),
        ("context", Message("assistant", "4", context=THOUGHT)),
    ],
)
def test_thoughts_are_kept_dropped_or_context(answer, thinking, expected):
    assert parse_messages([ASK, {"role": "assistant"} | answer], thinking)[1] == expected


def write(*messages: dict[str, object]) -> str:
    return json.dumps({"messages": messages})


MALFORMED = {
    "not json": "{broken",
    "no object": "[1, 2]",
    "no field": '{"text": "x"}',
    "no list": '{"messages": 7}',
    "text in its place": '{"messages": "hello"}',
    "empty list": '{"messages": []}',
    "no dictionary": '{"messages": ["a", "b", "c"]}',
    "no role": write({"content": "x"}),
    "unknown role": write({"role": "wizard", "content": "x"}),
    "empty answer": write(ASK, {"role": "assistant", "content": " "}),
    "no answer": write(ASK),
    "an image": write({"role": "user", "content": [{"type": "image"}]}),
    "late system": write(ASK, {"role": "system", "content": "y"}, ANSWER),
    "number as content": write({"role": "user", "content": 3}),
}
REASONS = {
    "not json": "no JSON object: Expecting property name",
    "no object": "no JSON object: another JSON value",
    "no field": "field 'messages' holds no messages",
    "no list": "no messages: the field holds no list of them",
    "text in its place": "no messages: the field holds a text that is no JSON list",
    "empty list": "no messages: the field holds no list of them",
    "no dictionary": "unusable messages: message 1 is no object with role and content",
    "no role": "unknown role: 'None' of message 1; it may be assistant, bot",
    "unknown role": "unknown role: 'wizard' of message 1; it may be assistant, bot",
    "empty answer": "empty answer: message 2",
    "no answer": "no answer: no message is the assistant's",
    "an image": "no text: message 1 has a part that is no text",
    "late system": "unusable messages: a system message is not the first",
    "number as content": "no text: the content of message 1 is no text",
}


def read_file(path: Path, **settings) -> list[Document]:
    given = DocumentsSettings(path=str(path), messages="messages", **settings)
    (file,) = list_inputs(given, "corpus.documents").files
    return list(read_documents(file, 100_000))


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_conversation_has_a_reason_and_costs_no_other(name, tmp_path):
    good = json.dumps({"messages": [ASK, ANSWER]})
    path = tmp_path / "talk.jsonl"
    path.write_text(f"{good}\n{MALFORMED[name]}\n{good}\n")
    first, bad, last = read_file(path)
    assert first.messages == last.messages == PLAIN
    assert first.text == "4"
    assert not bad.messages
    assert (bad.fault or "").startswith(REASONS[name])


def test_parquet_with_nested_messages_and_pairs_of_fields(tmp_path):
    rows = [{"messages": [ASK, ANSWER], "id": "a"}, {"messages": [], "id": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "talk.parquet")
    good, bad = read_file(tmp_path / "talk.parquet")
    assert (good.doc_id, good.messages) == ("a", PLAIN)
    assert bad.fault == REASONS["empty list"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "response": "4"}))
    pairs = DocumentsSettings(path=str(tmp_path / "pairs.jsonl"), messages=("prompt", "response"))
    (file,) = list_inputs(pairs, "corpus.documents").files
    assert [document.messages for document in read_documents(file, 1000)] == [PLAIN]


def test_conversations_and_plain_text_are_not_mixed():
    with pytest.raises(ValueError, match="'b' is plain text and others are conversations"):
        CorpusSettings.model_validate({"documents": [{"path": "a", "messages": "m"}, "b"]})
    with pytest.raises(ValueError, match="files of format text have no fields"):
        DocumentsSettings(path="a", messages="m", format="text")


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> list[ChatFormat]:
    folder = tmp_path_factory.mktemp("formats")
    return [load_family(name, folder / name) for name in ("chatml", "gemma")]


def test_long_conversations_are_divided_between_turns(formats):
    turns = [
        message
        for number in range(9)
        for message in (Message("user", f"{number} + 1?"), Message("assistant", f"{number + 1}!"))
    ]
    document = Document(
        "d",
        "",
        "".join(m.content for m in turns[1::2]),
        messages=(Message("system", "Add."), *turns),
    )
    table, kept, rejects = build_chat_rows([document], formats[0], formats, max_tokens=90)
    assert (kept, rejects) == ([document], [])
    rows = read_messages(table)
    assert len(rows) > 2
    assert all(row[0] == Message("system", "Add.") for row in rows)
    assert [message for row in rows for message in row[1:]] == turns
    assert "".join(table["text"].to_pylist()) == document.text
    assert table["ends_document"].to_pylist() == [False] * (len(rows) - 1) + [True]
    for form in formats:
        lengths = [len(form.encode_one(row).ids) for row in rows]
        assert max(lengths) <= 90
    answers, numbers = read_answers(table)
    ids, offsets = flatten_column(table, "target_ids")
    spelled = [
        b"".join(
            formats[0].tokenizer.token_bytes[i] or b"" for i in ids[offsets[row] :][start:stop]
        )
        for row in range(len(rows))
        for start, stop, _ in answers[numbers[row] : numbers[row + 1]]
    ]
    assert [text.decode() for text in spelled] == [m.content for m in turns[1::2]]


def test_an_answer_that_is_too_long_loses_its_end_and_a_long_prompt_its_conversation(formats):
    ask = Message("user", "Count.")
    long = Message("assistant", " ".join(str(number) for number in range(500)))
    document = Document("d", "", long.content, messages=(ask, long))
    table, _, rejects = build_chat_rows([document], formats[0], formats, max_tokens=120)
    ((_, answer),) = read_messages(table)
    assert not rejects
    assert answer.is_cut
    assert long.content.startswith(answer.content)
    lengths = [len(form.encode_one([ask, answer]).ids) for form in formats]
    assert 110 <= max(lengths) <= 120
    ((_, stop, end),) = read_answers(table)[0].tolist()
    assert stop == end
    prompt = Message("user", long.content)
    document = Document("d", "", "Yes.", messages=(prompt, Message("assistant", "Yes.")))
    table, kept, (reject,) = build_chat_rows([document], formats[0], formats, max_tokens=120)
    assert (table.num_rows, kept) == (0, [])
    assert reject.reason.startswith("unusable messages: the messages before an answer fill a row")
