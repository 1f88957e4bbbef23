"""lm-eval tasks score models as they were trained, and a wrong task is reported at once."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from rayfuse.config.base import UserError
from rayfuse.config.evaluate import EvaluateSettings, TasksSettings
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.config.overrides import RecipeError
from rayfuse.evaluate.bits_per_byte import load_scored_model
from rayfuse.evaluate.lm_eval_model import EnsembleLM, TextLM
from rayfuse.evaluate.lm_eval_tasks import (
    check_tasks,
    open_task_manager,
    read_questions,
    run_tasks,
)
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.run.tasks import describe_tasks

LOCAL = Path(__file__).parents[2] / "recipes" / "tasks"
ITEMS = [
    ("Once upon a time there was a little", ["girl.", "x = y[1:]"], 0),
    ("Tom was very happy. He went to the park to", ["quantum", "play"], 1),
    ("Lily saw a big dog. The dog was", ["nice.", "12"], 1),
]


def make_tasks(folder: Path, **overrides: Any) -> Path:
    """Write a folder with a set of its own, its loader and a task of two choices."""
    folder.mkdir(exist_ok=True)
    names = ("question", "choices", "answer")
    lines = [json.dumps(dict(zip(names, item, strict=True))) for item in ITEMS]
    (folder / "set.jsonl").write_text("\n".join(lines))
    (folder / "local.py").write_text((LOCAL / "local.py").read_text())
    config = {
        "task": "choose",
        "test_split": "test",
        "output_type": "multiple_choice",
        "dataset_kwargs": {"file": "set.jsonl"},
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc_norm", "acc")
        ],
    } | overrides
    lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
    text = "custom_dataset: !function local.load_lines\n" + "\n".join(lines)
    (folder / f"{config['task']}.yaml").write_text(text)
    return folder


def settings(folder: Path, *names: str, **more: Any) -> EvaluateSettings:
    own = {name: more.pop(name) for name in ("limit", "num_fewshot") if name in more}
    tasks = TasksSettings(names=names, folder=str(folder), data=str(folder), **own)
    return EvaluateSettings(tasks=tasks, **more)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> str:
    return str(shared_data / "models" / "stories260k")


@pytest.fixture
def model(stories: str) -> TextLM:
    lm = load_scored_model(ModelSettings(model=stories, dtype="float32"))
    return TextLM(lm, load_tokenizer(stories), batch_tokens=64, context_tokens=512)


def logprob_by_hand(stories: str, text: str, num_scored: int | None) -> tuple[float, bool]:
    """Compute the log-probability of the last tokens of a text from the model's full logits."""
    ids = [1, *load_tokenizer(stories).encode([text])[0].tolist()]  # BOS is 1
    network = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    with torch.no_grad():
        logprobs = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    places = range(len(ids) - (num_scored or len(ids) - 1), len(ids))
    chosen = [logprobs[at - 1, ids[at]].item() for at in places]
    return sum(chosen), all(logprobs[at - 1].argmax().item() == ids[at] for at in places)


def test_continuations_have_the_log_likelihood_computed_by_hand(model: TextLM, stories: str):
    asked = [(f"{question}", f" {choice}") for question, choices, _ in ITEMS for choice in choices]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
    encode = load_tokenizer(stories).encode
    for (context, continuation), (logprob, is_greedy) in zip(asked, found, strict=True):
        number = len(encode([context + continuation])[0]) - len(encode([context])[0])
        expected, expected_greedy = logprob_by_hand(stories, context + continuation, number)
        assert logprob == pytest.approx(expected, rel=1e-4)
        assert is_greedy == expected_greedy
    assert any(is_greedy for _, is_greedy in found) != all(is_greedy for _, is_greedy in found)


def test_a_text_without_context_begins_with_the_start_token(model: TextLM, stories: str):
    text = "Once upon a time, there was a little girl named Lily."
    expected, _ = logprob_by_hand(stories, text, None)
    ((alone, _),) = model.loglikelihood([Instance("loglikelihood", {}, ("", text), 0)])
    (rolling,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert (alone, rolling) == pytest.approx((expected, expected), rel=1e-4)


def test_control_tokens_in_a_text_are_text(model: TextLM):
    assert model.tok_encode("a</s>") != [*model.tok_encode("a"), 2]
    assert len(model.tok_encode("</s>")) > 1


def test_a_long_context_is_truncated_at_its_start(model: TextLM):
    long = "Tom and Lily went home. " * 200
    pair = (long + "They were very", " happy.")
    ((logprob, _),) = model.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    assert math.isfinite(logprob)
    with pytest.raises(ValueError, match="tokens does not fit into the model's context of 512"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", " " + long), 0)])


def test_batched_generation_equals_greedy_decoding_up_to_the_first_stop(
    model: TextLM, stories: str
):
    prompts = ["Once upon a time", "Lily", "Tom saw a big red ball. He"]
    asked = {"until": ["was", "were not"], "max_gen_toks": 12}
    request = [Instance("generate_until", {}, (prompt, asked), 0) for prompt in prompts]
    together = model.generate_until(request)
    network = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = load_tokenizer(stories)
    stopped: list[bool] = []
    for prompt, written in zip(prompts, together, strict=True):
        ids = [1, *tokenizer.encode([prompt])[0].tolist()]
        done = len(ids)
        for _ in range(12):  # by hand: the likeliest token each time
            with torch.no_grad():
                logits = network(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        text = b"".join(tokenizer.token_bytes[i] or b"" for i in ids[done:]).decode()
        stops = [at for stop in ("was", "were not") if (at := text.find(stop)) >= 0]
        assert written == text[: min(stops, default=len(text))]
        assert written
        stopped.append(bool(stops))
    assert any(stopped) != all(stopped)


def test_a_task_score_follows_from_its_log_likelihoods(model: TextLM, stories: str, tmp_path: Path):
    own = settings(make_tasks(tmp_path / "tasks"), "choose")
    first, second = run_tasks(model, open_task_manager(own.tasks), "choose", own)
    assert (first.metric, second.metric) == ("acc_norm", "acc")  # in the definition's order
    encode = load_tokenizer(stories).encode
    hits, hits_norm = [], []
    for question, choices, answer in ITEMS:
        scores = []
        for choice in choices:
            text = f"{question} {choice}"
            number = len(encode([text])[0]) - len(encode([question])[0])
            scores.append(logprob_by_hand(stories, text, number)[0])
        lengths = [len(choice) for choice in choices]
        hits.append(float(np.argmax(scores) == answer))
        hits_norm.append(float(np.argmax(np.array(scores) / lengths) == answer))
    assert (second.values, second.value) == (tuple(hits), pytest.approx(np.mean(hits)))
    assert first.values == tuple(hits_norm)
    assert 0 < second.value < 1  # neither all nor none: the test can fail


def test_bits_per_byte_of_a_task_are_those_of_the_texts(
    model: TextLM, stories: str, tmp_path: Path
):
    folder = make_tasks(
        tmp_path / "tasks",
        task="loss",
        output_type="loglikelihood_rolling",
        doc_to_target="question",
        doc_to_text="",
        doc_to_choice=None,
        metric_list=[
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    )
    own = settings(folder, "loss")
    (score,) = run_tasks(model, open_task_manager(own.tasks), "loss", own)
    nats = [-logprob_by_hand(stories, question, None)[0] for question, *_ in ITEMS]
    num_bytes = [len(question) for question, *_ in ITEMS]
    assert score.value == pytest.approx(sum(nats) / math.log(2) / sum(num_bytes), rel=1e-4)
    assert score.weights == tuple(map(float, num_bytes))
    assert not score.higher_is_better


def test_the_ensemble_of_a_model_with_itself_scores_as_the_model(model: TextLM, tmp_path: Path):
    own = settings(make_tasks(tmp_path / "tasks"), "choose")
    manager = open_task_manager(own.tasks)
    alone = run_tasks(model, manager, "choose", own)
    asked = [Instance("loglikelihood", {}, ("a", " b"), 0)] * len(model.token_nll)
    ensemble = EnsembleLM([model.token_nll] * 3)
    answers = ensemble.loglikelihood(asked)
    assert [logprob for logprob, _ in answers] == pytest.approx(
        [-row.nats.sum() for row in model.token_nll]
    )
    assert run_tasks(ensemble, manager, "choose", own) == alone


def test_few_shots_and_a_limit_change_the_requests(
    model: TextLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_tasks(tmp_path / "tasks", fewshot_split="test")
    contexts: list[str] = []
    own = model._encode_pair

    def note(context: str, continuation: str) -> tuple[list[int], list[int]]:
        contexts.append(context)
        return own(context, continuation)

    monkeypatch.setattr(model, "_encode_pair", note)
    plain = settings(folder, "choose", limit=2)
    manager = open_task_manager(plain.tasks)
    assert len(run_tasks(model, manager, "choose", plain)[0].questions) == 2
    assert contexts == [question for question, *_ in ITEMS[:2] for _ in range(2)]
    contexts.clear()
    run_tasks(model, manager, "choose", settings(folder, "choose", num_fewshot=1))
    examples = [f"{question} {choices[answer]}\n\n" for question, choices, answer in ITEMS]
    assert len(contexts) == 6
    assert all(context.startswith(tuple(examples)) for context in contexts)


def test_tasks_are_identified_by_definitions_data_and_settings(tmp_path: Path):
    folder = make_tasks(tmp_path / "tasks")
    before = describe_tasks(settings(folder, "choose").tasks)
    assert describe_tasks(settings(folder, "choose").tasks) == before
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "local.pyc").write_bytes(b"x")
    assert describe_tasks(settings(folder, "choose").tasks) == before
    assert describe_tasks(settings(folder, "choose", limit=1).tasks) != before
    (folder / "set.jsonl").write_text(json.dumps({"question": "a", "choices": ["b"], "answer": 0}))
    assert describe_tasks(settings(folder, "choose").tasks) != before


def test_a_task_that_cannot_run_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_tasks(tmp_path / "tasks", unsafe_code=True)
    with pytest.raises(ValueError, match=r"choose runs .* evaluate.run_generated_code: true"):
        check_tasks(settings(folder, "choose"))
    with pytest.raises(ValueError, match=r"choose runs model-written code outside any sandbox"):
        check_tasks(settings(folder, "choose", run_generated_code=True))
    make_tasks(folder, unsafe_code=False)
    check_tasks(settings(folder, "choose"))
    check_tasks(EvaluateSettings())
    (folder / "set.jsonl").unlink()
    with pytest.raises(ValueError, match=r"choose cannot be loaded .* check evaluate.tasks.data"):
        check_tasks(settings(folder, "choose"))
    with pytest.raises(ValueError, match=r"tasks.folder is .*gone', a folder that does not exist"):
        describe_tasks(settings(tmp_path / "gone", "choose").tasks)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; `pip install rayfuse\[tasks\]`"):
        describe_tasks(settings(folder, "choose").tasks)


def test_an_unknown_task_is_named_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_tasks(tmp_path / "tasks")
    few = make_tasks(tmp_path / "few", task="arc_easy")  # lm-eval's own take half a minute to list
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(few / "manager.py"))
    assert "arc_easy" in open_task_manager(settings(folder, "arc_easy").tasks).task_index
    with pytest.raises(
        ValueError, match=r"has 'chose', which is not a task; did you mean 'choose'\?"
    ):
        open_task_manager(settings(folder, "chose").tasks)
    with pytest.raises(ValueError, match=r"which is not a task; did you mean 'arc_easy'\?"):
        open_task_manager(settings(folder, "arc_eazy").tasks)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "the task 'a' is listed twice"),
        (["../a.yaml"], "is not a task name; give a folder"),
        ([], "names is empty; give 1 or more"),
    ],
)
def test_names_of_tasks_are_checked_with_the_recipe(names: list[str], message: str):
    recipe = {
        "storage": "s",
        "corpus": {"documents": "d"},
        "target": {"model": "t"},
        "sources": [{"name": "a", "model": "a"}],
        "evaluate": {"tasks": {"names": names}},
    }
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe)


def test_every_local_task_finds_its_set(shared_data: Path):
    tasks = TasksSettings(names=("local_bbh",), folder=str(LOCAL), data=str(shared_data / "eval"))
    manager = open_task_manager(tasks)
    sizes = {
        name: len(task.eval_docs)
        for entry in manager.all_tasks
        for name, task in manager.load([entry])["tasks"].items()
    }
    bbh = [size for name, size in sizes.items() if "bbh" in name]
    assert (len(bbh), max(bbh), min(bbh)) == (18, 250, 146)
    own = {name: size for name, size in sizes.items() if "bbh" not in name}
    assert own == {
        "local_arc_challenge": 299,
        "local_arc_easy": 570,
        "local_boolq": 1000,
        "local_gsm8k": 1319,
        "local_gsm8k_loss": 1319,
        "local_hellaswag": 500,
        "local_humaneval": 164,
        "local_humaneval_loss": 164,
        "local_multipl_e_cpp": 161,
        "local_multipl_e_java": 158,
        "local_multipl_e_js": 161,
        "local_openbookqa": 500,
    }


def test_the_solutions_of_humaneval_pass_and_other_code_does_not(shared_data: Path):
    tasks = TasksSettings(
        names=("local_humaneval", "local_multipl_e"),
        folder=str(LOCAL),
        data=str(shared_data / "eval"),
    )
    check_tasks(EvaluateSettings(tasks=tasks, run_generated_code=True))
    manager = open_task_manager(tasks)
    task = manager.load(["local_humaneval"])["tasks"]["local_humaneval"]
    for doc in list(task.eval_docs)[:3]:
        assert task.process_results(doc, [doc["canonical_solution"]]) == {"pass_at_1": 1.0}
        assert task.process_results(doc, ["    return None"]) == {"pass_at_1": 0.0}
    strlen = {
        "cpp": "    return string.size();",
        "java": "        return string.length();",
        "js": "  return string.length;\n}",
    }
    for language, solution in strlen.items():
        name = f"local_multipl_e_{language}"
        task = manager.load([name])["tasks"][name]
        doc = task.eval_docs[0]
        assert task.process_results(doc, [solution]) == {"pass_at_1": 1.0}
        assert task.process_results(doc, [solution.replace("string", "1 + string")]) == {
            "pass_at_1": 0.0
        }
    task = manager.load(["local_multipl_e_java"])["tasks"]["local_multipl_e_java"]
    doc = next(doc for doc in task.eval_docs if "even_odd_palindrome" in doc["name"])
    count = """ // by Java's class for pairs
        long odd = 0, even = 0;
        for (long i = 1; i <= n; i++) {
            String digits = Long.toString(i);
            if (!new StringBuilder(digits).reverse().toString().equals(digits)) continue;
            if (i % 2 == 0) even++; else odd++;
        }
        return Pair.with(even, odd);"""
    assert task.process_results(doc, [count]) == {"pass_at_1": 1.0}
    turned = count.replace("(even, odd)", "(odd, even)")
    assert task.process_results(doc, [turned]) == {"pass_at_1": 0.0}


def test_questions_are_read_as_they_are_asked_with_answers_that_are_text(tmp_path):
    folder = make_tasks(tmp_path / "tasks")
    chosen = settings(folder, "choose", limit=2).tasks
    assert chosen is not None
    asked = [f"{ITEMS[0][0]} girl.", f"{ITEMS[1][0]} play"]  # and the right choices
    assert read_questions(chosen) == {"choose": asked}
    make_tasks(folder, task="rolling", output_type="loglikelihood_rolling", doc_to_text="",
               doc_to_target="question")  # fmt: skip
    chosen = settings(folder, "rolling").tasks
    assert chosen is not None
    assert [text.strip() for text in read_questions(chosen)["rolling"]] == [i[0] for i in ITEMS]
    make_tasks(folder, task="broken", doc_to_text="{{ 1 // (1 - answer) }}")
    chosen = settings(folder, "broken").tasks
    assert chosen is not None
    with pytest.raises(UserError, match="the questions of the task broken cannot be read"):
        read_questions(chosen)
