"""Licences are found however a card spells them, and are not those of another model."""

import pytest

from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.report.licences import FREE, UNKNOWN, Licence, read_licence
from rayfuse.report.model_card import LOCAL_PATH


@pytest.mark.parametrize(
    ("front", "name", "terms"),
    [
        ("license: mit", "mit", FREE),
        ("license: Apache-2.0", "apache-2.0", FREE),
        ("license:\n- mit\n- apache-2.0", "mit, apache-2.0", FREE),
        ("license: [mit, llama2]", "mit, llama2", "no, except for derivatives of Llama 2"),
        ("license: [mit, own]", "mit, own", UNKNOWN),
        (
            "license: other\nlicense_name: Llama-3",
            "llama-3",
            "no, except for derivatives of Llama 3",
        ),
        (
            "license: [other]\nlicense_name: llama 3",
            "llama 3",
            "no, except for derivatives of Llama 3",
        ),
        ("license: []", None, UNKNOWN),
        ("license: 3", None, UNKNOWN),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_licence_is_found_in_each_spelling(tmp_path, front, name, terms, mark):
    card = f"{mark}---\n{front}\n---\nText\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    licence = read_licence(ModelSettings(model=str(tmp_path)), is_online=False)
    assert (licence.name, licence.terms) == (name, terms)
    assert licence.forbids == terms.startswith("no,")


@pytest.mark.parametrize(
    "path",
    [
        "/a",
        "~/a",
        "file:///a",
        "local://a",
        "LOCAL://a",
        "../a",
        "a/../b",
        "..",
        "C:\\a",
        "\\\\host\\a",
    ],
)
def test_paths_outside_of_the_recipes_folder_are_local(path):
    assert LOCAL_PATH.search(path)


@pytest.mark.parametrize(
    "path", ["a/b", "org/model", "s3://bucket/a", "hf://a", "a..b", "...", "ab"]
)
def test_other_names_are_not_local_paths(path):
    assert not LOCAL_PATH.search(path)


def test_the_source_of_an_aligned_store_has_not_the_licence_of_the_target(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    source = SourceSettings(
        name="a", model=str(tmp_path), captured_from="store", captured_aligned=1
    )
    licence = read_licence(source, is_online=False)
    assert licence == Licence("an unnamed model", None, "an aligned store does not name its model")
    assert licence.is_unknown
