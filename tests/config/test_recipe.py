"""Recipes: defaults, overrides, and errors that name the setting and the remedy."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayfuse.config.align import METHODS
from rayfuse.config.load import parse_recipe, read_recipe
from rayfuse.config.overrides import RecipeError, parse_yaml
from rayfuse.config.recipe import Recipe, dump_recipe

ROOT = Path(__file__).parents[2]

MINIMAL: dict[str, Any] = {
    "storage": "run",
    "corpus": {"documents": "docs.jsonl"},
    "target": {"model": "t"},
    "sources": [{"name": "a", "model": "m"}],
}


def with_setting(path: str, value: Any) -> dict[str, Any]:
    """Build the minimal recipe with one more setting."""
    values = json.loads(json.dumps(MINIMAL))
    *sections, last = path.split(".")
    parent = values
    for part in sections:
        parent = parent[int(part)] if part.isdigit() else parent.setdefault(part, {})
    parent[last] = value
    return values


def test_minimal_recipe_has_defaults_for_all_other_settings():
    recipe = parse_recipe(MINIMAL)
    assert recipe.capture.top_k == 16
    assert recipe.corpus.documents[0].path == "docs.jsonl"


def test_dumped_recipe_reads_back_unchanged():
    recipe = parse_recipe(with_setting("train.lambda", 0.7))
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.lamda", 0.9, r"train.lamda is no setting of rayfuse; did you mean 'lambda'\?"),
        ("sources", [], r"sources is empty; give 1 or more"),
        ("sources.0.name", "all", r"^sources.0.name is 'all': [^\n]*$"),  # nothing of the list
        ("captur", {}, r"captur is no setting of rayfuse; did you mean 'capture'\?"),
        ("sources.0.gpu", 1, r"sources.0.gpu is no setting .* did you mean 'gpus'\?"),
        ("storage_patience_seconds", 9, r"storage_patience_seconds is now storage_retry_seconds"),
        ("corpus.recut", True, r"corpus.recut is now corpus.resplit"),
        ("align.method", "mined", r"align.method 'mined' is now 'min_edit_distance'"),
        ("align.method", "statistics", r"align.method 'statistics' is now 'cooccurrence'"),
        ("capture.top_k", 256, r"capture.top_k is 256"),
        ("capture", {"signal": "top_k_and_sampled_tail", "top_k": 250}, r"draws 12 .* 255 entries"),
        ("capture.top_k", "many", r"capture.top_k is 'many': input should be a valid integer"),
        ("align.method", "magic", r"align.method is 'magic': input should be 'bytes'"),
        ("sources.0.name", "../x", r"sources.0.name is '../x': use letters"),
        ("sources.0.name", "fused", r"are names that rayfuse itself uses"),
        ("sources.0.name", "merged-ties", r"merged-\.\.\. are names that rayfuse itself uses"),
        ("train.rows_per_step", 129, None),
        (
            "train",
            {"rows_per_step": 3, "num_workers": 4},
            r"rows_per_step 3 is below num_workers 4",
        ),
        ("train", {"min_workers": 4, "num_workers": 2}, r"min_workers 4 is above num_workers 2"),
        ("train.lambda", 1.5, r"train.lambda is 1.5: lambda is a share"),
        ("train.lambda", {"start": 0.9, "end": 2}, r"2 is not between 0 and 1"),
        ("train.temperature", 0, r"temperature 0 is not above 0"),
        ("fuse", {"method": "fixed_share", "unit": "span"}, r"unit span has no meaning"),
        (
            "fuse",
            {"method": "fixed_share", "cost": "nats_per_token"},
            r"cost nats_per_token has no",
        ),
        ("train.sequence_tokens", 100, r"sequence_tokens 100 is below corpus.max_tokens 2048"),
        ("sources.0.gpus", 1.5, r"gpus is 1.5; an actor has a part of one GPU, or a whole number"),
        ("corpus.documents", [], r"corpus.documents is empty; give 1 or more"),
    ],
)
def test_error_names_the_setting_its_value_and_the_remedy(path, value, message):
    values = with_setting(path, value)
    if message is None:
        assert parse_recipe(values).model_dump(mode="json")
        return
    with pytest.raises(RecipeError, match=message):
        parse_recipe(values)


@pytest.mark.parametrize("signal", ["sampled", "top_k_and_sampled_tail"])
def test_signal_with_draws_is_refused_for_a_backend_without_them(signal):
    values = with_setting("sources.0.backend", "vllm")
    assert parse_recipe(values).sources[0].backend == "vllm"
    with pytest.raises(RecipeError, match="source a has backend vllm, which makes no draws"):
        parse_recipe(values | {"capture": {"signal": signal}})


@pytest.mark.parametrize("method", METHODS)
def test_a_posterior_is_refused_without_the_ends_of_tokens(method):
    values = MINIMAL | {"fuse": {"method": "fixed_share"}, "align": {"method": method}}
    if METHODS[method].has_signal_at_boundaries:
        assert parse_recipe(values).align.method == method
        return
    with pytest.raises(RecipeError, match=rf"align.method {method} .* use align.method bytes or"):
        parse_recipe(values)


@pytest.mark.parametrize("method", METHODS)
def test_inside_tokens_is_refused_for_methods_without_a_rule_for_it(method):
    values = MINIMAL | {"align": {"method": method, "inside_tokens": True}}
    if METHODS[method].can_look_inside:
        assert parse_recipe(values).align.inside_tokens
        return
    with pytest.raises(RecipeError, match=rf"method {method} has no rule .* use method bytes"):
        parse_recipe(values)


def test_inside_tokens_is_refused_where_random_draws_are_all_that_is_stored():
    values = MINIMAL | {"align": {"inside_tokens": True}}
    assert not parse_recipe(MINIMAL).align.inside_tokens
    for signal in ("top_k", "top_k_and_sampled_tail"):
        assert parse_recipe(values | {"capture": {"signal": signal}}).align.inside_tokens
    with pytest.raises(RecipeError, match=r"capture.signal sampled stores random draws alone; use"):
        parse_recipe(values | {"capture": {"signal": "sampled"}})


def test_duplicate_source_names_are_refused():
    values = with_setting("sources", [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}])
    with pytest.raises(RecipeError, match="two sources have the name 'a'"):
        parse_recipe(values)


def test_a_target_in_float16_is_refused_since_its_gradients_overflow():
    with pytest.raises(RecipeError, match=r"float16.*use bfloat16 or float32"):
        parse_recipe(MINIMAL | {"target": MINIMAL["target"] | {"dtype": "float16"}})


def test_error_names_a_missing_setting():
    values = {key: value for key, value in MINIMAL.items() if key != "target"}
    with pytest.raises(RecipeError, match="target is missing"):
        parse_recipe(values)


def test_all_errors_are_reported_at_once():
    values = with_setting("train.lambda", 2) | {"seeed": 1}
    with pytest.raises(RecipeError, match=r"(?s)train.lambda.*seeed|seeed.*train.lambda"):
        parse_recipe(values)


def test_overrides_reach_sections_lists_and_names(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    recipe = read_recipe(
        path, ["train.lambda=0.9", "sources.a.gpus=0.5", "sources.0.model=z", "seed=3"]
    )
    assert recipe.train.clm_weight == 0.9
    assert (recipe.sources[0].gpus, recipe.sources[0].model, recipe.seed) == (0.5, "z", 3)


@pytest.mark.parametrize("override", ["train.lambda", "=3", "sources.b.gpus=1", "storage.x=1"])
def test_override_of_unknown_form_or_item_is_refused(override, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError, match="override"):
        read_recipe(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("", "holds no settings"),
        ("- 1", "holds no settings"),
        ("a: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_file_without_settings_is_refused(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


YAML_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch MARKER']",
        "!!python/object/new:os.system ['touch MARKER']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!bool x",
        "!!timestamp x",
        "2024-99-99",
        "9" * 5000,
        "[" * 50_000,
        "*nothing",
        "[",
    ],
    ids=lambda value: value[:30],
)
def test_fault_28_value_that_is_not_plain_yaml_is_refused_in_files_and_overrides(
    value, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    plain = yaml.safe_dump(MINIMAL)
    path.write_text(plain + f"seed: {value}\n")
    with pytest.raises(RecipeError, match=r"r.yaml is not valid YAML"):
        read_recipe(path)
    path.write_text(plain)
    for key in ("seed", "sources.a.name", "sources.0"):
        with pytest.raises(RecipeError, match=r"override .* is not valid YAML") as caught:
            read_recipe(path, [f"{key}={value}"])
        assert len(str(caught.value)) < 500
    assert [file.name for file in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("key", ["storage", "corpus", "sources", "seed", "train", "fusion"])
def test_fault_28_aliases_that_expand_to_gigabytes_are_refused_without_expanding(key, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(YAML_BOMB + yaml.safe_dump(MINIMAL | {key: "BOMB"}).replace("BOMB", "*a11"))
    with pytest.raises(RecipeError, match="is no setting of rayfuse") as caught:
        read_recipe(path)
    assert len(str(caught.value)) < 10_000


def test_fault_28_recursive_value_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL).replace("storage: run", "storage: &a [*a]"))
    with pytest.raises(RecipeError, match=r"storage is .*valid string"):
        read_recipe(path)


@pytest.mark.parametrize(
    "key", ["__class__", "__init__.__globals__", "sources.0.__dict__", "sources.a.x", "env.PATH"]
)
def test_fault_28_override_reaches_only_settings(key, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError, match="is no setting of rayfuse"):
        read_recipe(path, [f"{key}=1"])


@pytest.mark.parametrize("text", ["${HOME}/run", "$USER", "`id`", "$(id)", "%(HOME)s", "{0.x}"])
def test_fault_28_variables_in_values_are_not_expanded(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(with_setting("storage", text)))
    assert read_recipe(path).storage == text
    assert read_recipe(path, [f"target.model={yaml.safe_dump(text)}"]).target.model == text


@pytest.mark.parametrize("text", ["a\x00b", "\ud800"])
def test_fault_28_nul_and_unpaired_surrogates_are_refused(text):
    documents = [{"path": "docs.jsonl", "domain": text}]
    for path, value in (("storage", text), ("corpus.documents", documents)):
        with pytest.raises(RecipeError, match="contains a NUL byte or an unpaired surrogate"):
            parse_recipe(with_setting(path, value))


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../../etc",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "%2e%2e%2fetc",
        "a\n",
        "a\x00",
        "~root",
        "",
        " ",
        "ａ",
        "target",
        "C:",
        "-rf",
    ],
)
def test_fault_29_source_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(RecipeError, match=r"sources.0.name is"):
        parse_recipe(with_setting("sources.0.name", name))


@pytest.mark.parametrize(
    "address",
    [
        "s3://name:canary-1@bucket/run",
        "https://host/docs.jsonl?X-Amz-Signature=canary-1&x=2",
        "https://host/docs.jsonl?a=b&sig=canary-1",
        "https://host/docs.jsonl?access_token=canary-1",
        "https://host/" + "folder/" * 12 + "docs.jsonl?access_token=canary-1",
        "s3://name:canary-1" + "x" * 80 + "@bucket/run",
    ],
)
@pytest.mark.parametrize("setting", ["storage", "corpus.documents", "sources.0.model"])
def test_address_with_credentials_is_refused_and_the_error_hides_them(setting, address):
    with pytest.raises(RecipeError, match="contains credentials; remove them") as raised:
        parse_recipe(with_setting(setting, address))
    assert "canary" not in str(raised.value)


def test_error_hides_credentials_in_an_override(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(RecipeError, match="is not of the form") as raised:
        read_recipe(tmp_path / "recipe.yaml", ["s3://name:canary-1@bucket/run"])
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        "abfs://box@account.net/run",
        "s3://bucket/part-?.jsonl",
        "gs://bucket/key=1/a",
        "hf://datasets/org/set@main/train.parquet",
        "s3://bucket/mail@example/a.jsonl?versionId=3sL4",
        "https://host:8443/docs.jsonl?download=true",
    ],
)
def test_address_without_credentials_is_accepted(address):
    assert parse_recipe(with_setting("corpus.documents", address)).corpus.documents[0].path


def test_error_names_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere.yaml cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_stored_json_schema_is_current():
    stored = json.loads((ROOT / "recipes/schema.json").read_text())
    assert stored == Recipe.model_json_schema(by_alias=True), "run `make schema`"


def test_all_recipes_in_the_repository_are_valid():
    paths = sorted((ROOT / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        read_recipe(path)


@pytest.mark.parametrize("name", ["train.learning_rate", "fuse.temperature", "sources.0.cpus"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(name, value):
    with pytest.raises(RecipeError, match=f"{name}.* is (inf|nan): input should be a finite"):
        parse_recipe(with_setting(name, value))
    with pytest.raises(RecipeError, match=r"fuse.weights.a is inf"):
        parse_recipe(with_setting("fuse.weights", {"a": float("inf")}))


@pytest.mark.parametrize(("storage", "reason"), [("", "is empty"), (" ", "is empty"),
    ("memory://a", "each process has its own memory")])  # fmt: skip
def test_storage_that_is_lost_with_the_process_is_refused(storage, reason):
    with pytest.raises(RecipeError, match=f"storage is .*{reason}; give a folder, or s3://"):
        parse_recipe(with_setting("storage", storage))


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {seed: 1}\nstorage: a\ntrain:\n  epochs: 2\n")
    with pytest.raises(RecipeError, match="gives the key 'train' twice; remove one") as raised:
        read_recipe(path)
    assert "line 3" in str(raised.value)
    with pytest.raises(RecipeError, match="gives the key 'a' twice"):
        parse_yaml("{x: {a: 1, a: 2}}", "override x")


def test_merge_keys_that_double_with_each_line_are_refused_at_once():
    lines = ["a0: &a0 {k0: 0, l0: 0}"]
    for i in range(1, 40):
        lines.append(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 0}}")
    began = time.monotonic()
    with pytest.raises(RecipeError, match="has a merge key '<<'; write the settings out"):
        parse_yaml("\n".join(lines), "the recipe x")
    assert time.monotonic() - began < 5
