"""Examples to answer: only answers are learnt, with a chat template and without one."""

import json

import pytest

from fms.datasets import BadRecordError, fetch, get_dataset
from fms.training.loss import IGNORED
from fms.utils.tokenizers import CharTokenizer, get_tokenizer

ALPACA = {"instruction": "Add.", "input": "1+1", "output": "Two."}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THOUGHT = "{% if loop.last CONDITION %}thought,{% endif %}{{ m.content }}"
FORGETFUL = TEMPLATE.replace("{{ m.content }}", THOUGHT.replace("CONDITION", "and m.role == 'assistant'"))


def rows(tmp_path, *examples, template=None, tokenizer=None, **options) -> list[tuple[str, str]]:
    """(text, what is learnt of it) of each row, without padding."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    tokenizer = tokenizer or CharTokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.pad_token_id = 0  # a token that none of the texts has
    options = {"seq_len": 200, "epochs": 1, "held_out": 0, "pack": False, "shuffle": False, **options}
    batches = list(get_dataset("instruction", tokenizer, file, **options).batches(1))
    decode = lambda ids, drop: tokenizer.decode([i for i in ids.tolist() if i != drop], skip_special_tokens=False)
    return [(decode(b["input_ids"][0], tokenizer.pad_token_id), decode(b["labels"][0], IGNORED)) for b in batches]


def test_without_a_template_headings_lead_and_eos_ends_the_answer(tmp_path):
    text = "\x02### Instruction:\nAdd.\n\n1+1\n\n### Response:\nTwo.\x03"
    assert rows(tmp_path, ALPACA) == [(text, "Two.\x03")]
    text, learnt = rows(tmp_path, {"messages": CHAT})[0]
    assert text.startswith("\x02### System:\nBe kind.\n\n### Instruction:\nHi")
    assert learnt == "Hello!\x03See you.\x03"


def test_a_chat_template_is_used_where_there_is_one(tmp_path):
    found = rows(tmp_path, ALPACA, {"messages": CHAT}, template=TEMPLATE)
    assert found[0] == ("<user>Add.\n\n1+1</>\n<assistant>Two.</>\n", "Two.</>\n")
    assert found[1][1] == "Hello!</>\nSee you.</>\n"


def test_a_template_that_writes_past_answers_otherwise_teaches_only_what_it_would_ask_for(tmp_path):
    text, learnt = rows(tmp_path, {"messages": CHAT}, template=FORGETFUL)[0]
    assert text.endswith("<assistant>thought,See you.</>\n")
    assert learnt == "thought,See you.</>\n"
    inviting = FORGETFUL.removesuffix("{% endif %}") + "<think>{% endif %}"
    assert rows(tmp_path, {"messages": CHAT}, template=inviting)[0] == (text, learnt)
    everywhere = TEMPLATE.replace("{{ m.content }}", THOUGHT.replace("CONDITION", ""))
    with pytest.raises(ValueError, match="no document is left"):
        rows(tmp_path, {"messages": CHAT}, template=everywhere)


def test_examples_are_cut_on_the_right_and_those_without_an_answer_left_out(tmp_path, caplog):
    assert rows(tmp_path, ALPACA, seq_len=45)[0] == ("\x02### Instruction:\nAdd.\n\n1+1\n\n### Response:\nTw", "Tw")
    other = {"instruction": "x" * 100, "output": "y"}
    assert len(rows(tmp_path, other, ALPACA, seq_len=45)) == 1
    assert "1 examples left out: their first seq_len=45 tokens have no answer, the first is" in caplog.text
    assert "data.jsonl:1" in caplog.text
    with pytest.raises(ValueError, match="no document is left"):
        rows(tmp_path, other, seq_len=45)


def test_packed_examples_stay_whole(tmp_path):
    examples = [{"instruction": f"{n}", "output": "o" * n} for n in range(1, 9)]
    found = rows(tmp_path, *examples, pack=True, seq_len=100)
    assert len(found) < len(examples)
    assert all(text.startswith("\x02") and text.endswith("o\x03") for text, _ in found)
    assert "".join(learnt for _, learnt in found) == "".join("o" * n + "\x03" for n in range(1, 9))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"instruction": "x"}, "'instruction' and 'output' .* this has 'instruction'"),
        ({"instruction": "x", "output": ""}, "the field 'output' is empty"),
        ({"messages": "hello"}, "must be an array"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "assistant"}]}, "message 1 must have a text"),
        ({"messages": CHAT[:2]}, "nothing to learn"),
    ],
)
def test_a_bad_example_is_named_or_passed_over(record, words, tmp_path):
    with pytest.raises(BadRecordError, match=rf"data\.jsonl:2: .*{words}"):
        rows(tmp_path, ALPACA, record)
    assert len(rows(tmp_path, ALPACA, record, on_bad_record="skip")) == 1


def test_a_template_that_refuses_a_chat_makes_it_a_bad_record(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRecordError, match=r"data\.jsonl:1: .*roles must alternate"):
        rows(tmp_path, ALPACA, template=template)


@pytest.mark.slow
def test_the_template_of_a_real_model(tmp_path, smollm2):
    ((text, learnt),) = rows(tmp_path, {"messages": CHAT}, tokenizer=get_tokenizer(str(smollm2)))
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert learnt == "Hello!<|im_end|>\nSee you.<|im_end|>\n"


def test_without_a_path_the_file_is_fetched_once(tmp_path, monkeypatch, caplog):
    there = tmp_path / "there.json"
    there.write_text(json.dumps([ALPACA] * 2))
    monkeypatch.setenv("FMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "ALPACA", there.as_uri())
    assert get_dataset("instruction", CharTokenizer()).documents == 2
    assert f"fetching the Alpaca instructions (23 MB, CC BY-NC 4.0) into {tmp_path / 'cache'}" in caplog.text
    there.unlink()
    assert get_dataset("instruction", CharTokenizer()).documents == 2
    assert caplog.text.count("fetching") == 1
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["alpaca_data.json"]


def test_a_file_that_cannot_be_fetched_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("FMS_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "ALPACA", (tmp_path / "nothing").as_uri())
    with pytest.raises(ValueError, match=r"could not be had from file://.*--dataset_path FILE"):
        get_dataset("instruction", CharTokenizer())
    assert not list(tmp_path.iterdir())


def test_the_cache_is_that_of_dev_py(monkeypatch):
    import dev

    for value in ("~/models", ""):
        monkeypatch.setenv("FMS_CACHE", value)
        assert fetch.cache_directory() == dev.cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert fetch.cache_directory() == dev.cache_directory()
