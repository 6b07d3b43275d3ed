"""`fms eval`: perplexity of a text, lm-eval's tasks with our own model and with the adapter, equal both ways."""

import json
import math
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from fms.cli import main
from fms.cli.evaluate import harness_model, log_likelihoods, perplexity
from fms.cli.loading import Loaded
from fms.models import freeze, get_model
from fms.utils.tokenizers import get_tokenizer
from tests.small import small_model
from tests.tiny import write_tiny_chat

ROOT = Path(__file__).parents[1]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
ROWS = [
    {"question": f"The capital of {country} is", "answer": f" {city}", "choices": [" Paris", " Rome", " Berlin"]}
    for country, city in (("France", "Paris"), ("Italy", "Rome"), ("Germany", "Berlin"))
]
KINDS = {
    "multiple_choice": "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]",
    "loglikelihood_rolling": "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
    "generate_until": 'generation_kwargs: {until: [".", "\\n"], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]',
}


def plain(model, context, tail):
    """One sequence at a time, without padding."""
    ids = [*context, *tail]
    scores = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    at = range(len(context) - 1, len(ids) - 1)
    picked = [scores[i, ids[i + 1]].item() for i in at]
    return sum(picked), all(scores[i].argmax() == ids[i + 1] for i in at)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_log_likelihoods_are_those_of_each_alone(batch_size):
    model = small_model()
    rows = [torch.randint(24, (n,)).tolist() for n in (9, 3, 14, 6, 30)]
    pairs = [(row[:k], row[k:]) for row, k in zip(rows, (4, 1, 13, 2, 11), strict=True)]
    greedy = rows[0][:4]
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy]))[0, -1].argmax()))
    pairs.append((greedy[:4], greedy[4:]))
    got = log_likelihoods(model, pairs, batch_size)
    for (score, best), (context, tail) in zip(got, pairs, strict=True):
        want, all_best = plain(model, context, tail)
        assert score == pytest.approx(want, abs=1e-4)
        assert best == all_best
    assert got[-1][1]


@torch.no_grad()
def test_of_what_is_too_long_the_end_counts():
    model = small_model()
    ids = torch.randint(24, (60,)).tolist()  # the context is 48
    (got,) = log_likelihoods(model, [(ids[:50], ids[50:])])
    assert got[0] == pytest.approx(plain(model, ids[-49:50], ids[50:])[0], abs=1e-4)


class Letters:
    """One id a character, those of a small model."""

    def vocab_size(self):
        return 24

    def encode(self, text, add_special_tokens=False):
        return [ord(c) % 24 for c in text]


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 7, 8, 9, 31])
def test_perplexity_scores_each_token_once_with_half_a_window_before_it(length):
    model, text = small_model(), "the quick brown fox jumps over it"[:length]
    found = perplexity(Loaded(model, Letters(), 0.0), text, context=8, batch_size=3)
    ids = Letters().encode(text)
    total = 0.0
    for i in range(1, length):  # the window that first reaches token i
        end = min(8 + -(-max(0, i + 1 - 8) // 4) * 4, length)
        total += plain(model, ids[max(0, end - 8) : i], ids[i : i + 1])[0]
    assert found["perplexity"] == pytest.approx(math.exp(-total / (length - 1)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / length, rel=1e-4)
    assert (found["tokens"], found["bytes"]) == (length, length)


def test_perplexity_on_the_command_line(tmp_path, capsys):
    model = str(write_tiny_chat(tmp_path / "model"))
    (tmp_path / "text").write_text("The quick brown fox. " * 30)
    words = ["eval", "--text", str(tmp_path / "text"), "--model_path", model, "--device_type", "cpu", "--json"]
    assert main([*words, "--context", "64", "--batch_size", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 630
    assert 1 < found["perplexity"] < 1e6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model_path", "MODEL"], "--tasks NAMES, of lm-eval, or --text FILE"),
        (["--model_path", "MODEL", "--text", "TEXT", "--tasks", "x"], "either --tasks"),
        (["--model_path", "MODEL", "--text", "TEXT", "--context", "1000"], "--context 1000 must be from 2 to the 256"),
        (["--model_path", "MODEL", "--text", "EMPTY"], "a text of 0 tokens"),
    ],
)
def test_faults(words, said, tmp_path, capsys):
    (tmp_path / "text").write_text("some words")
    (tmp_path / "empty").write_text("")
    model = str(write_tiny_chat(tmp_path / "model"))
    paths = {"MODEL": model, "TEXT": str(tmp_path / "text"), "EMPTY": str(tmp_path / "empty")}
    assert main(["eval", *(paths.get(word, word) for word in words), "--device_type", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"24 tokens, the model's vocabulary 20"):
        perplexity(Loaded(small_model(src_vocab_size=20), Letters(), 0.0), "abc")


def write_tasks(directory, kind):
    directory.mkdir()
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "capitals.yaml").write_text(TASK.format(data=data, kind=kind, more=KINDS[kind]))
    return directory


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tasks_on_the_command_line(tmp_path, monkeypatch, capsys):
    lm_tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    quick = partial(lm_tasks.TaskManager, include_defaults=False)  # looks at ten thousand files less
    monkeypatch.setattr(lm_tasks, "TaskManager", quick)
    model, tasks = write_tiny_chat(tmp_path / "model"), write_tasks(tmp_path / "tasks", "multiple_choice")
    words = ["--model_path", str(model), "--tasks", "capitals", "--include_path", str(tasks), "--device_type", "cpu"]
    words += ["--num_fewshot", "0", "--limit", "2", "--batch_size", "2"]
    assert main(["eval", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["capitals"]
    assert runpy.run_path(str(ROOT / "scripts/eval_harness.py"))["main"]([*words, "--model_source", "hf"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|capitals"))
    assert f"|acc     |↑  |  {found['acc,none']:g}|" in row
    assert main(["eval", *words, "--tasks", "capitols"]) == 2
    assert "capitols" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pair(smollm2, tmp_path_factory):
    """SmolLM2 as lm-eval runs it: our own, and transformers' way through the adapter."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from fms.models.convert import convert
    from fms.models.hf import to_hf_api

    model, directory = get_model(model_path=smollm2), tmp_path_factory.mktemp("smollm2") / "hf"
    convert(smollm2, directory, "hf")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    theirs = HFLM(pretrained=to_hf_api(model), tokenizer=tokenizer, batch_size=2, max_length=512)
    ours = harness_model(freeze(get_model(model_path=smollm2)), get_tokenizer(str(smollm2)), batch_size=2)
    ours.max_length = 512
    return ours, theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_gives_the_same_scores_both_ways(kind, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(write_tasks(tmp_path / "tasks", kind)), include_defaults=False)
    found = []
    for lm in pair:
        result = simple_evaluate(lm, tasks=["capitals"], task_manager=manager, bootstrap_iters=0, log_samples=True)
        scores = {n: v for n, v in result["results"]["capitals"].items() if isinstance(v, float)}
        found.append((scores, [sample["resps"] for sample in result["samples"]["capitals"]]))
    (ours, our_answers), (theirs, their_answers) = found
    assert ours
    assert ours == pytest.approx(theirs, rel=1e-4)
    if kind == "generate_until":
        assert our_answers == their_answers
    if kind == "multiple_choice":
        assert ours["acc,none"] == 1
