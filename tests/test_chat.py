"""`fms chat`: the conversation's cache is right after whatever happened to it, and the commands do what they say."""

import json
import sys
from io import StringIO
from pathlib import Path

import pytest

from fms.cli import main
from fms.cli.chat import Conversation
from fms.cli.loading import Loaded
from fms.models import freeze, get_model
from fms.modules.cache import StaticCache
from fms.utils.generation import generate
from fms.utils.tokenizers import get_tokenizer
from tests.tiny import write_tiny_chat

QUESTIONS = ["What is the capital of France?", "The quick brown fox", "Paris."]


def load(path: Path) -> Loaded:
    return Loaded(freeze(get_model(model_path=path)), get_tokenizer(path), 0.0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("tiny") / "chat")


@pytest.fixture(scope="session")
def dynamic(tmp_path_factory) -> Path:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    return write_tiny_chat(tmp_path_factory.mktemp("tiny") / "dynamic", rope_scaling=scaling)


@pytest.fixture
def conversation(tiny) -> Conversation:
    return Conversation(load(tiny))


def say(conversation: Conversation, text: str, **options) -> str:
    conversation.ask(text, 10)
    return "".join(conversation.answer(max_new_tokens=10, **options))


def fresh_answer(conversation: Conversation, **options) -> str:
    """The next answer by a conversation that has the same messages and an empty cache."""
    other = Conversation(conversation.loaded, conversation.system)
    other.messages = list(conversation.messages)
    return "".join(other.answer(max_new_tokens=10, **options))


def fed(conversation: Conversation, monkeypatch) -> list[int]:
    """How many tokens go through the model at each of its passes."""
    counts = []
    model, hidden = conversation.loaded.model, conversation.loaded.model.hidden

    def counting(input_ids, **kwargs):
        counts.append(input_ids.shape[1])
        return hidden(input_ids, **kwargs)

    monkeypatch.setattr(model, "hidden", counting)
    return counts


# The conversation


def test_answers_are_those_of_the_whole_template(conversation):
    model, tokenizer = conversation.loaded.model, conversation.loaded.tokenizer
    conversation.system = "Be brief."
    messages = [{"role": "system", "content": "Be brief."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages)
        (row,) = generate(model, [ids], tokenizer=tokenizer, max_new_tokens=10)
        answer = tokenizer.decode(row[len(ids) :])
        assert say(conversation, question) == answer
        messages.append({"role": "assistant", "content": answer})
    assert conversation.history() == messages


def test_what_the_cache_holds_is_not_computed_again(conversation, monkeypatch):
    counts = fed(conversation, monkeypatch)
    first = conversation.ask(QUESTIONS[0], 10) or conversation.ids()
    list(conversation.answer(max_new_tokens=4))
    assert counts == [len(first), 1, 1, 1]
    counts.clear()
    conversation.ask(QUESTIONS[1], 10)
    second = conversation.ids()
    same = next(i for i, (old, new) in enumerate(zip(conversation.held, second, strict=False)) if old != new)
    assert same >= len(first)
    list(conversation.answer(max_new_tokens=4))
    assert counts == [len(second) - same, 1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_an_answer_that_is_stopped_stays_as_far_as_it_came(conversation, options):
    say(conversation, QUESTIONS[0])
    conversation.ask(QUESTIONS[1], 10)
    answer = conversation.answer(max_new_tokens=10, **options)
    partial = "".join([next(answer), next(answer)])
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": partial}
    assert conversation.last is None
    conversation.ask(QUESTIONS[2], 10)
    expected = fresh_answer(conversation, **options)
    assert "".join(conversation.answer(max_new_tokens=10, **options)) == expected


@pytest.mark.parametrize("path", ["tiny", "dynamic"])
@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 9])
def test_an_interruption_in_the_middle_of_the_model(path, turns, after, request, monkeypatch):
    """Ctrl-C between the layers of the prefill (the first two calls) or of a step leaves a cache that is right."""
    conversation = Conversation(load(request.getfixturevalue(path)))
    assert isinstance(conversation.cache, StaticCache) == (path == "dynamic")
    for question in QUESTIONS[:turns]:
        say(conversation, question)
    before = list(conversation.messages)
    conversation.ask(QUESTIONS[1], 10)
    left = after
    with monkeypatch.context() as patch:
        for block in conversation.loaded.model.layers:

            def forward(*args, inner=block.forward):
                nonlocal left
                if not left:
                    raise KeyboardInterrupt
                left -= 1
                return inner(*args)

            patch.setattr(block, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.answer(max_new_tokens=10))
    if after < 2:
        assert conversation.messages == before
    else:
        assert len(conversation.messages) == len(before) + 2
    conversation.ask(QUESTIONS[2], 10)
    expected = fresh_answer(conversation)
    assert "".join(conversation.answer(max_new_tokens=10)) == expected


def test_an_error_takes_the_message_back(conversation):
    say(conversation, QUESTIONS[0])
    before = list(conversation.messages)
    conversation.ask(QUESTIONS[1], 10)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        list(conversation.answer(max_new_tokens=0))
    assert conversation.messages == before


def test_a_full_context_forgets_the_oldest_turns(conversation):
    conversation.system = "Be brief."
    gone = []
    for i in range(12):
        gone.append(conversation.ask(f"The quick brown fox jumps {i}", 20))
        expected = fresh_answer(conversation)
        assert "".join(conversation.answer(max_new_tokens=10)) == expected
        assert len(conversation.ids()) <= 256
    assert max(gone) > 1  # half of it at once
    assert gone.count(0) > len(gone) // 2
    assert conversation.history()[0] == {"role": "system", "content": "Be brief."}
    assert conversation.messages[0]["role"] == "user"


def test_a_message_longer_than_the_context(conversation):
    say(conversation, QUESTIONS[0])
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"the message makes \d+ tokens, and the model's context has 256"):
        conversation.ask("x" * 400, 10)
    assert conversation.messages == before


def test_an_answer_ends_where_the_context_does(conversation):
    room = 256 - len(conversation.loaded.tokenizer.apply_chat_template([{"role": "user", "content": ""}])) - 3
    conversation.ask("#" * room, 10)
    list(conversation.answer(max_new_tokens=50))
    said, _ = conversation.last
    assert (said.new_tokens, said.finish_reason) == (3, "length")


# The terminal


@pytest.fixture
def chat(tiny, capsys, monkeypatch):
    """Runs `fms chat` on some lines; returns what it printed, and its notes."""

    def run(*lines: str, words: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO("\n".join(lines)))
        assert main(["chat", "--model_path", str(tiny), "--max_new_tokens", "6", *words]) == 0
        return capsys.readouterr()

    return run


def saved(file: Path) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in json.loads(file.read_text())]


def test_a_chat(chat, tmp_path):
    out, notes = chat(*QUESTIONS[:2], "", f"/save {tmp_path}/chat.json", words=("--system", "Be brief.", "--stats"))
    messages = saved(tmp_path / "chat.json")
    assert [role for role, _ in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0][1] == "Be brief."
    assert [messages[1][1], messages[3][1]] == QUESTIONS[:2]
    assert out == f"{messages[2][1]}\n{messages[4][1]}\n"
    assert notes.count("stopped after 6 tokens (/set max_new_tokens=N for more)") == 2
    assert notes.count("tokens/s") == 2


def test_reset_and_system_and_quit(chat, tmp_path):
    file = tmp_path / "chat.json"
    chat("first", "/reset", "/system Be kind.", " /etc is a directory", f"/save {file}", "/quit", "never read")
    assert [words for _, words in saved(file)[:2]] == ["Be kind.", " /etc is a directory"]
    assert len(saved(file)) == 3
    once, _ = chat("first")
    again, _ = chat("second", "/reset", "first")
    assert again.endswith(once)


def test_set(chat):
    drawn, _ = chat("first", words=("--temperature", "1", "--seed", "4", "--top_k", "9"))
    out, notes = chat("/set temperature=1", "/set seed = 4", "/set top_k=9", "/set", "first")
    assert out == drawn
    assert "top_k=9\n" in notes
    greedy, _ = chat("first")
    assert greedy != drawn
    out, notes = chat("/set temperature=1", "/set temperature=none", "/set max_new_tokens=2", "first")
    assert greedy.startswith(out.removesuffix("\n"))
    assert "stopped after 2 tokens" in notes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rset", "there is no command /rset (did you mean 'reset'?)"),
        ("/set temprature=1", "there is no setting 'temprature' (did you mean 'temperature'?)"),
        ("/set top_k=many", "/set top_k=VALUE: 'many' does not do for it"),
        ("/set max_new_tokens=0", "'0' does not do for it"),
        ("/set do_sample=perhaps", "'perhaps' does not do for it"),
        ("/set top_p=2", "top_p=2.0 must lie in (0, 1]"),
        ("/save", "/save needs a file"),
        ("/save /no/such/directory/x", "No such file or directory"),
        ("/save HERE", "exists: name another file"),
        ("x" * 400, "the model's context has 256: shorten it"),
    ],
)
def test_errors_do_not_end_a_chat(line, said, chat):
    out, notes = chat(line.replace("HERE", __file__), "first")
    assert f"error: {notes.split('error: ')[1].splitlines()[0]}" == notes.splitlines()[0]
    assert said in notes
    assert out == chat("first")[0]


def test_help_names_every_command(chat):
    _, notes = chat("/help")
    assert [line.split()[0] for line in notes.splitlines()] == ["/help", "/reset", "/save", "/system", "/set", "/quit"]


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat, tmp_path, monkeypatch):
    whole = Conversation.answer

    def interrupted(self, **options):
        for n, piece in enumerate(whole(self, **options)):
            yield piece
            if n == 2 and len(self.messages) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "answer", interrupted)
    out, notes = chat("first", "second", f"/save {tmp_path}/chat.json")
    messages = saved(tmp_path / "chat.json")
    assert [role for role, _ in messages] == ["user", "assistant", "user", "assistant"]
    assert "stopped\n" in notes
    assert out == f"{messages[1][1]}\n{messages[3][1]}\n"


def test_ctrl_c_and_ctrl_d_at_the_prompt(tiny, capsys, monkeypatch):
    keys = [KeyboardInterrupt, "hello", EOFError]

    def typed(prompt: str) -> str:
        key = keys.pop(0)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["chat", "--model_path", str(tiny), "--max_new_tokens", "3"]) == 0
    output = capsys.readouterr()
    assert "Ctrl-D or /quit quits" in output.err
    assert output.out
    keys[:] = [KeyboardInterrupt]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["chat", "--model_path", str(tiny)]) == 130


def test_a_model_without_a_chat_template(tmp_path, capsys):
    base = write_tiny_chat(tmp_path / "base")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert main(["chat", "--model_path", str(base)]) == 2
    assert "no chat template: use an instruction-tuned one, or give --chat_template FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_remembers(smollm2, monkeypatch):
    conversation = Conversation(load(smollm2))
    counts = fed(conversation, monkeypatch)
    conversation.ask("What is the capital of France?", 64)
    first = len(conversation.ids())
    answer = "".join(conversation.answer(max_new_tokens=64))
    assert "Paris" in answer
    assert counts[0] == first
    counts.clear()
    conversation.ask("In which country is that city?", 64)
    second = len(conversation.ids())
    assert "France" in "".join(conversation.answer(max_new_tokens=64))
    assert counts[0] < second - first  # neither the first question nor its answer was computed again
