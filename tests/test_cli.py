"""The `fms` command, in this process where that will do, on a tiny model made on the fly."""

import json
import os
import runpy
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch

from fms import __version__
from fms.cli import guarded, main
from fms.models import freeze, get_model
from fms.utils.generation import generate
from fms.utils.tokenizers import get_tokenizer
from tests.tiny import write_tiny_chat

ROOT = Path(__file__).parents[1]
PROMPT = "The quick brown"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("tiny") / "chat")


@pytest.fixture(scope="session")
def loaded(tiny):
    return freeze(get_model(model_path=tiny)), get_tokenizer(tiny)


@pytest.fixture
def fms(tiny, capsys):
    """Runs `fms generate` on the tiny model; returns what it printed."""

    def run(*words: object) -> str:
        common = ["--model_path", str(tiny), "--max_new_tokens", "12", "--device_type", "cpu"]
        code = main(["generate", *map(str, words), *common])
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out

    return run


def failed(capsys, words: list[str], name: str = "fms") -> str:
    """The one line of an error."""
    try:
        code = main(words)
    except SystemExit as exit:
        code = exit.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith(f"{name}: error: ")
    assert output.err.count("\n") == 1
    return output.err


# Help and errors


def test_help_and_version_do_not_wait_for_torch():
    program = (
        "import sys; from fms.cli import main\n"
        "for words in (['--help'], ['generate', '--help'], ['--version']):\n"
        "    try: main(words)\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'tqdm', 'tokenizers'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"fms {__version__}\n")
    assert "--model_path" in result.stdout


def test_every_flag_has_a_help_that_says_its_default():
    from fms.cli.flags import make_parser

    commands = make_parser()._subparsers._group_actions[0].choices
    known = {"generate", "chat", "embed", "benchmark", "plan", "train", "tokenize", "plot", "eval"}
    assert set(commands) == known | {"models", "convert", "validate"}
    for name, parser in commands.items():
        for action in parser._actions:
            needless = action.required or action.dest in ("help", "prompt", "texts", "file", "batch", "model_path")
            assert action.help, (name, action.dest)
            assert needless or "--greedy" in action.option_strings or "default:" in action.help, (name, action.dest)


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["genrate"], "there is no command 'genrate' (did you mean 'generate'?); there are generate, chat, embed"),
        (["generate", "x", "--temprature=3"], "there is no flag --temprature (did you mean '--temperature'?)"),
        (["generate", "x", "--temp", "3"], "there is no flag --temp"),
        (["generate", "The", "capital", "of"], "too many words, from 'capital' on: put quotes"),
        (["generate", "x", "--max_new_tokens", "0"], "--max_new_tokens: '0' must be a whole number, at least 1"),
        (["generate", "x", "--greedy", "--do_sample"], "not allowed with argument"),
        (["generate", "x"], "which model? name its directory, .gguf file or Hub id"),
        (["generate", "x", "--architecture", "llama"], "random ones have no tokenizer"),
        (["generate", "x", "--file", "y", "--model_path", "TINY"], "give one of PROMPT, --file and --batch"),
        (["generate", "x", "--system", "y", "--model_path", "TINY"], "--system is a part of a chat: add --chat"),
        (["generate", "x", "--top_p", "1.5", "--model_path", "no"], "top_p=1.5 must lie in (0, 1]"),
        (["generate", "x", "--greedy", "--top_k", "1"], "top_k says how to draw"),
        (["generate", "x", "--stop", "", "--model_path", "TINY"], "--stop '' would end every answer"),
        (["generate", "", "--model_path", "TINY"], "PROMPT is empty"),
        (["generate", "x", "--model_path", "no.gguf"], "no.gguf: no such file or directory"),
        (["generate", "--file", "no.txt", "--model_path", "TINY"], "no.txt: No such file or directory"),
        (["generate", "a" * 999, "--model_path", "TINY"], "the limit is 256"),
        (["generate", "x", "--model_path", "TINY", "--dtype", "fp31"], "did you mean 'fp32'?"),
        (["generate", "x", "--model_path", "TINY", "--device_type", "gpu"], "device_type='gpu'"),
        (["generate", "x", "--model_path", "TINY", "--architecture", "lama"], "did you mean 'llama'?"),
        (["generate", "x", "--model_path", "TINY", "--tokenizer", "no.json"], "no tokenizer 'no.json'"),
        (["models", "lama"], "did you mean 'llama'?"),
        (["convert", "TINY", "out", "--to", "hff"], "invalid choice: 'hff'"),
        (["convert", "TINY", "TINY", "--to", "own"], "chat"),
        (["chat", "--model_path", "TINY", "--min_p", "2"], "min_p=2.0 must lie in [0, 1]"),
    ],
)
def test_errors_are_one_line(words, said, tiny, capsys):
    assert said in failed(capsys, [word.replace("TINY", str(tiny)) for word in words])


def test_debug_lets_the_error_out(tiny):
    with pytest.raises(ValueError, match="PROMPT is empty"):
        main(["generate", "", "--model_path", str(tiny), "--debug"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("no such thing"), "no such thing"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: CUDA out of memory."),
        (FileNotFoundError(2, "No such file", "x.json"), "x.json: No such file"),
    ],
)
def test_messages_of_errors(error, said, capsys):
    def run() -> int:
        raise error

    assert guarded(run, "fms", debug=False) == 2
    assert capsys.readouterr().err.startswith(f"fms: error: {said}")


def test_a_mistake_of_ours_is_a_traceback():
    def run() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        guarded(run, "fms", debug=False)


def test_ctrl_c(capsys):
    def run() -> int:
        raise KeyboardInterrupt

    assert guarded(run, "fms", debug=False) == 130
    assert capsys.readouterr().err == "\n"


@pytest.mark.parametrize(
    "program", ["main(['--help'])", "sys.exit(guarded(lambda: print('text') or 0, 'fms', debug=False))"]
)
def test_a_closed_pipe_is_quiet(program):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", f"import sys; from fms.cli import guarded, main; {program}"]
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.stderr == ""
    assert result.returncode in (0, 141)  # argparse gives up with 0


# Generate


def test_generate_prints_what_the_library_generates(fms, loaded):
    model, tokenizer = loaded
    expected = generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=12)
    assert fms(PROMPT) == expected + "\n"
    assert fms(PROMPT, "--no_cache") == expected + "\n"


def test_where_a_prompt_comes_from(fms, tmp_path, monkeypatch):
    expected = fms(PROMPT)
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    assert fms("--file", file) == expected
    for words in (["-"], []):
        monkeypatch.setattr(sys, "stdin", StringIO(PROMPT + "\n"))
        assert fms(*words) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fms("--file=~/prompt.txt") == expected


def test_no_prompt_on_a_terminal(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert 'there is no prompt: fms generate "The capital' in failed(capsys, ["generate", "--model_path", str(tiny)])


def test_json_and_statistics(tiny, capsys, fms):
    text = fms(PROMPT).removesuffix("\n")
    words = [PROMPT, "--model_path", str(tiny), "--max_new_tokens", "12", "--json", "--stats", "--device_type", "cpu"]
    assert main(["generate", *words]) == 0
    output = capsys.readouterr()
    answer = json.loads(output.out)
    assert answer["prompt"] == PROMPT
    assert answer["text"] == text
    assert answer["new_tokens"] == 12
    assert answer["finish_reason"] == "length"
    assert set(answer["seconds"]) == {"load", "first_token", "total"}
    assert f"tokens: {answer['prompt_tokens']} in, 12 out, ended by length" in output.err
    for word in ("tokens/s", "GB of the process", "(cpu, float32)"):
        assert word in output.err


@pytest.mark.gpu
def test_a_gpu_is_found_and_its_memory_told(tiny, capsys):
    assert main(["generate", PROMPT, "--model_path", str(tiny), "--max_new_tokens", "12", "--stats"]) == 0
    said = capsys.readouterr().err
    assert "GB of the GPU" in said
    assert "(cuda:0, float32)" in said


def test_chat_is_the_template(fms, loaded):
    model, tokenizer = loaded
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages)
    row = generate(model, torch.tensor(ids), max_new_tokens=12, eos_token_id=tokenizer.eos_token_ids)
    expected = tokenizer.decode(row[len(ids) :])
    assert fms(PROMPT, "--chat", "--system", "Be brief.") == expected + "\n"
    assert fms(PROMPT) != expected + "\n"


def test_a_chat_template_of_ones_own(fms, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    assert fms(PROMPT, "--chat", "--chat_template", template) == fms(PROMPT)


def test_stop_strings(fms):
    text = fms(PROMPT).removesuffix("\n")
    stop = text[4:6]
    assert fms(PROMPT, "--stop", stop, "--stop", "zzz") == text[: text.index(stop)] + "\n"
    answer = json.loads(fms(PROMPT, "--stop", stop, "--json"))
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == text[: text.index(stop)]


def test_eos_ends(fms, loaded, tmp_path, tiny):
    """The tokenizer in another directory ends texts at what is the third token here."""
    model, tokenizer = loaded
    third = tokenizer.convert_ids_to_tokens(generate(model, [tokenizer.encode(PROMPT)], max_new_tokens=3)[0][-1:])[0]
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": third}))
    answer = json.loads(fms(PROMPT, "--json", "--tokenizer", tmp_path))
    assert answer["finish_reason"] == "eos"
    assert answer["new_tokens"] <= 3


def test_sampling(fms):
    drawn = [fms(PROMPT, "--temperature", "1", "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != fms(PROMPT)
    assert fms(PROMPT, "--greedy") == fms(PROMPT)


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1", "--seed", "5"]])
def test_a_batch_is_each_prompt_alone(fms, tmp_path, sampling):
    prompts = ["The quick", "What is the capital of France?", "Paris.", "fox dog"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n\n" for prompt in prompts))
    seeds = [["--seed", 5 + i] if sampling else [] for i in range(len(prompts))]
    alone = [json.loads(fms(p, "--json", *sampling[:2], *s)) for p, s in zip(prompts, seeds, strict=True)]
    for size in (1, 3):
        lines = fms("--batch", file, "--batch_size", size, "--json", *sampling).splitlines()
        together = [json.loads(line) for line in lines]
        for answer in (*together, *alone):
            answer.pop("seconds", None), answer.pop("tokens_per_second", None)
        assert together == alone


def test_a_batch_of_plain_lines(fms, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("The quick\n\nParis.\n")
    output = fms("--batch", file, "--stop", "zzz")
    first, second = (fms(prompt).removesuffix("\n") for prompt in ("The quick", "Paris."))
    assert output == f"=== 1: The quick\n{first}\n=== 2: Paris.\n{second}\n"
    monkeypatch.setattr(sys, "stdin", StringIO(file.read_text()))
    assert fms("--batch", "-") == output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there is no prompt in it"),
        (b'{"prompt": "x"}\n\n{"prompt": "y"\n', ":3: '{\"prompt\": \"y\"' is not JSON: Expecting ',' delimiter"),
        (b'{"prompt": "x"}\n["y"]\n', ':2: \'["y"]\' is not a JSON object with a "prompt"'),
        (b'{"promt": "x"}\n', "is not a JSON object with a \"prompt\" (did you mean 'promt'?)"),
        (b'{"text": "x"}\n', ':1: \'{"text": "x"}\' is not a JSON object with a "prompt"'),
        (b'{"prompt": 3}\n', ":1: the prompt is 3, it must be text"),
        (b"\xff\n", "not UTF-8 text"),
        (b"a\n" + b"#" * 300 + b"\n", "too long for the model's context of 256 tokens: prompts 2 (300 tokens)"),
    ],
)
def test_batch_files_that_are_wrong(content, said, tmp_path, tiny, capsys):
    file = tmp_path / "batch"
    file.write_bytes(content)
    line = failed(capsys, ["generate", "--batch", str(file), "--model_path", str(tiny)])
    assert f"{file}" in line
    assert said in line


def test_random_weights_say_so(capsys):
    words = ["x", "--architecture", "llama", "--variant", "micro", "--tokenizer", "char_tokenizer"]
    assert main(["generate", *words, "--max_new_tokens", "2"]) == 0
    assert "random weights" in capsys.readouterr().err


# Models and checkpoints


def test_models(capsys):
    assert main(["models", "granite"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["architecture", "variant", "parameters", "sources"]
    assert all(row.startswith("granite") for row in rows)
    assert "8b" in rows[0]
    assert "8.17 B" in rows[0]
    assert main(["models", "--json"]) == 0
    listed = {(m["architecture"], m["variant"]): m for m in json.loads(capsys.readouterr().out)}
    assert listed["llama", "7b"]["parameters"] == 6_738_415_616
    assert listed["llama", "7b"]["sources"] == ["hf", "meta", "gguf", "fms", "own"]


def test_convert_and_validate(tiny, tmp_path, capsys, fms):
    out = tmp_path / "own"
    assert main(["convert", str(tiny), str(out), "--to", "own"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"wrote {out}: ")
    assert "files, " in output.out
    assert output.err == ""  # no progress bar where there is no terminal
    assert main(["generate", PROMPT, "--model_path", str(out), "--max_new_tokens", "12"]) == 0
    assert capsys.readouterr().out == fms(PROMPT)
    assert main(["validate", str(out)]) == 0
    assert f"{out}: ok: llama in the format own, 21 tensors" in capsys.readouterr().out


def test_validate_says_what_is_wrong(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = write_tiny_chat(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    assert main(["validate", str(broken)]) == 1
    output = capsys.readouterr().out
    assert "lm_head.weight: 1 of " in output
    assert output.endswith(": 1 problem\n")


# scripts/inference.py


@pytest.fixture
def script(capsys):
    run = runpy.run_path(str(ROOT / "scripts" / "inference.py"))["main"]

    def call(*words: object) -> tuple[int, str, str]:
        try:
            code = run([*map(str, words)])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return call


def test_the_script_answers(script, tiny, tmp_path):
    common = ("--model_path", tiny, "--max_new_tokens", 6, "--device_type", "cpu")
    code, alone, said = script(*common)
    assert (code, said) == (0, "")
    assert alone.startswith("use_cache True;; do_sample False\n==========\nHow do I make")
    assert script(*common, "--batch_input")[1] == alone
    assert script(*common, "--no_use_cache")[1] == alone.replace("use_cache True", "use_cache False")
    code, out, said = script(*common, "--unfuse_weights", "--min_pad_length", 8, "--default_dtype", "fp32")
    assert out == alone
    assert said == "inference.py: --unfuse_weights has no effect\ninference.py: --min_pad_length has no effect\n"
    notes = tmp_path / "notes.txt"
    notes.write_text("the quick brown fox")
    assert "\n\nthe quick brown fox\n----------\n" in script(*common, "--context_file", notes)[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--distributed"], "needs several processes: start with torchrun"),
        (["--compile_mode", "reduce-overhead"], "needs --compile"),
        (["--architecture", "llama"], "random ones have no tokenizer"),
        (["--modl_path", "x"], "there is no flag --modl_path (did you mean '--model_path'?)"),
    ],
)
def test_the_script_refuses(script, words, said):
    code, out, err = script(*words)
    assert (code, out) == (2, "")
    assert err.startswith("inference.py: error: ")
    assert said in err


@pytest.mark.slow
def test_a_real_model_answers(smollm2):
    words = ["What is the capital of France?", "--model_path", smollm2, "--chat", "--stats", "--device_type", "auto"]
    result = subprocess.run([sys.executable, "-m", "fms", "generate", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens/s" in result.stderr
