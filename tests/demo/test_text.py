import ast
import json
import re
from pathlib import Path
from random import Random

import pytest

from rayfuse.demo.arithmetic import PROBLEMS, write_addition, write_multiplication, write_sheets
from rayfuse.demo.text import (
    DOMAINS,
    SIZES,
    Document,
    PartSizes,
    collect_domains,
    count_bytes,
    split_docstrings,
    split_documents,
    write_documents,
)


@pytest.fixture(scope="module")
def domains() -> dict[str, list[Document]]:
    return collect_domains(seed=0)


def long_paragraphs(documents: tuple[Document, ...]) -> set[str]:
    blocks = (block for document in documents for block in document.text.split("\n\n"))
    return {" ".join(block.split()) for block in blocks if len(" ".join(block.split())) >= 60}


def test_no_group_and_no_paragraph_is_in_two_parts(domains: dict[str, list[Document]]):
    parts = split_documents(domains, seed=0)
    for left, right in (
        (parts.pretrain, parts.corpus),
        (parts.pretrain, parts.held_out),
        (parts.corpus, parts.held_out),
    ):
        groups = [
            {(document.domain, document.group) for document in part} for part in (left, right)
        ]
        assert not groups[0] & groups[1]
        assert not long_paragraphs(left) & long_paragraphs(right)


def test_every_part_has_the_wanted_bytes_of_every_domain(domains: dict[str, list[Document]]):
    parts = split_documents(domains, seed=0)
    for domain in DOMAINS:
        for part, wanted in (
            (parts.corpus, SIZES[domain].corpus),
            (parts.held_out, SIZES[domain].held_out),
        ):
            num_bytes = count_bytes(document for document in part if document.domain == domain)
            assert wanted <= num_bytes < wanted + 60_000


def test_same_seed_gives_the_same_parts_and_another_seed_others(
    domains: dict[str, list[Document]],
):
    assert split_documents(domains, seed=0) == split_documents(domains, seed=0)
    first, second = (split_documents(domains, seed=seed).held_out for seed in (0, 1))
    assert {document.group for document in first} != {document.group for document in second}


def test_document_ids_are_unique(domains: dict[str, list[Document]]):
    ids = [document.doc_id for documents in domains.values() for document in documents]
    assert len(ids) == len(set(ids))


def test_code_and_prose_share_no_paragraph(domains: dict[str, list[Document]]):
    code, prose = (long_paragraphs(tuple(domains[name])) for name in ("code", "prose"))
    assert not code & prose


def test_error_names_a_domain_with_too_little_text():
    domains = {"code": [Document("code/one/0", "code", "x = 1\n")]}
    with pytest.raises(ValueError, match="too little code"):
        split_documents(domains, sizes={"code": PartSizes(corpus=10, held_out=10, pretrain=10)})


def test_removing_docstrings_does_not_change_the_code():
    source = (
        '"""Module."""\nimport os\n\n\nclass A:\n    """Class."""\n\n\n'
        'def f(x):\n    """Two\n\n    lines, é."""\n    return "not a docstring"\n\n\n'
        'def g(): "Short."\n'
    )
    bare, docstrings = split_docstrings(source)
    assert docstrings == ["Module.", "Class.", "Two\n\nlines, é.", "Short."]
    expected = (
        "import os\n\n\nclass A:\n    pass\n\n\n"
        'def f(x):\n    return "not a docstring"\n\n\ndef g(): pass\n'
    )
    assert ast.dump(ast.parse(bare)) == ast.dump(ast.parse(expected))


def check_equations(text: str) -> int:
    """Check every equation `a op b = c` of a text, and count them."""
    found = re.findall(r"(?<![\d+x-] )\b(\d+(?: [-+x] \d+)+) = (\d+)", text)
    for expression, result in found:
        assert eval(expression.replace("x", "*")) == int(result), expression
    return len(found)


def test_all_equations_are_correct():
    sheets = write_sheets(3, num_bytes=200_000, sheet_chars=2000)
    assert sum(map(check_equations, sheets)) > 3000


def test_answers_in_words_are_correct():
    random = Random(0)
    texts = [write(random) for write in PROBLEMS for _ in range(200)]
    for text in texts:
        if text.startswith("The numbers"):
            step = int(re.findall(r"grow by (\d+)", text)[0])
            shown, following = text.split(" grow by ")
            terms = [int(term) for term in re.findall(r"\d+", shown)]
            terms += [int(term) for term in re.findall(r"\d+", following)[1:]]
            assert terms == list(range(terms[0], terms[0] + 8 * step, step))
        if text.startswith("Put in order"):
            before, after = text.removeprefix("Put in order ").split(": ")
            numbers = [int(number) for number in before.split(", ")]
            after, ends = after.split(". The smallest is ")
            assert [int(number) for number in after.split(", ")] == sorted(numbers)
            assert [int(n) for n in re.findall(r"\d+", ends)] == [min(numbers), max(numbers)]
        if text.startswith("Divide"):
            number, divisor = map(int, re.findall(r"Divide (\d+) by (\d+)", text)[0])
            quotient, rest = map(int, re.findall(r"goes (\d+) times, remainder (\d+)", text)[0])
            assert divmod(number, divisor) == (quotient, rest)


def test_addition_writes_every_carry():
    assert write_addition(58, 947) == (
        "Add 58 + 947: 8 + 7 = 15, write 5, carry 1; 5 + 4 + 1 = 10, write 0, carry 1; "
        "0 + 9 + 1 = 10, write 0, carry 1; write 1. So 58 + 947 = 1005."
    )


def test_multiplication_is_worked_place_by_place():
    assert write_multiplication(305, 4) == (
        "Multiply 305 x 4: 300 x 4 = 1200; 5 x 4 = 20; 1200 + 20 = 1220. The product is 1220."
    )


def test_problems_are_unique():
    sheets = write_sheets(0, num_bytes=500_000, sheet_chars=2000)
    problems = [line for sheet in sheets for line in sheet.splitlines()]
    assert len(problems) == len(set(problems))


def test_written_documents_read_back_and_an_equal_file_is_not_rewritten(tmp_path: Path):
    documents = [Document("prose/a/0", "prose", "Grüße\n\n\u2028end"), Document("b/b/0", "b", "x")]
    path = tmp_path / "documents.jsonl"
    write_documents(documents, path)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [
        {"id": document.doc_id, "domain": document.domain, "text": document.text}
        for document in documents
    ]
    before = path.stat().st_mtime_ns
    write_documents(documents, path)
    assert path.stat().st_mtime_ns == before
    write_documents(documents[:1], path)
    assert path.read_text(encoding="utf-8").count("\n") == 1
