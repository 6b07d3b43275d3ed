"""What the README and docs/ say is so: commands parse, code runs, links and names exist, generated tables are fresh.

`python -m tests.test_docs` writes the generated parts anew.
"""

import ast
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "scripts/README.md", *sorted(ROOT.glob("docs/*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
THIS = "python -m tests.test_docs"


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of some languages ("" for those without one)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """The text without its fenced blocks, and without what is said of things to come or of the existing FMS."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^## Planned\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if "planned" not in line.lower()]
    if page.name == "migrating.md":
        lines = [line.split(" | ", 1)[1] if line.startswith("| ") else line for line in lines]
    return "\n".join(lines)


def inline(page: Path) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))


# Commands


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page, "", "sh", "bash"):
        yield from (line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())
    yield from inline(page)


def check_command(line: str) -> None:
    from dev import TASKS
    from fms.cli import COMMANDS
    from fms.cli.flags import make_parser

    words = shlex.split(line, comments=True)
    if program := re.search(r"(scripts|examples)/\S+\.py", line):
        assert (ROOT / program[0]).is_file(), f"{line}: there is no {program[0]}"
        if program[1] == "scripts":
            make_script_parser = runpy.run_path(str(ROOT / program[0]))["make_parser"]
            make_script_parser().parse_args(words[words.index(program[0]) + 1 :])
    elif "dev.py" in words:
        task = words[words.index("dev.py") + 1]
        assert task in TASKS, f"{line}: dev.py has no task {task}"
    elif words[-2:-1] == ["fms"] and not words[-1].startswith("-"):
        assert words[-1] in COMMANDS, f"{line}: fms has no command {words[-1]}"
    else:
        make_parser().parse_args([word for word in words[words.index("fms") + 1 :] if word != "--help"])


def is_command(line: str) -> bool:
    start = r"(python3[.\d]* )?dev\.py \w|(python3? -m )?fms [a-z-]|python3? (scripts|examples)/"
    return "…" not in line and re.match(start, line) is not None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page):
    for line in filter(is_command, commands(page)):
        check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "fms generate x --tempreture 1",
        "fms convret",
        "dev.py demmo",
        "python scripts/inference.py --x",
        "python examples/x.py",
    ],
)
def test_a_wrong_command_is_noticed(line):
    assert is_command(line)
    with pytest.raises((SystemExit, AssertionError)):
        check_command(line)


def test_there_are_commands():
    found = [line for page in PAGES for line in commands(page) if is_command(line)]
    assert {"python3 dev.py demo", "python3 dev.py test"} <= set(found)
    assert {"generate", "chat", "models", "convert", "validate"} <= {
        line.partition("fms ")[2].split()[0] for line in found if "fms " in line
    }


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_flags_exist(page):
    from fms.training.config import TrainConfig

    source = "".join(file.read_text() for file in [*ROOT.glob("fms/cli/*.py"), *ROOT.glob("scripts/*.py")])
    source += "".join(f'"--{entry.name}"' for entry in fields(TrainConfig))
    for text in inline(page):
        for flag in set(re.findall(r"(?<!\S)--[a-z_-]+", text)) - {"--help", "--nproc_per_node", "--nnodes"}:
            assert f'"{flag}"' in source, f"{page.name}: {flag}"


# Code


def run(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run it in a directory, without lasting registrations."""
    from fms.models import registry
    from fms.utils.serialization import sources

    monkeypatch.chdir(directory)
    for module, table in ((registry, "_FACTORIES"), (sources, "_SOURCES")):
        monkeypatch.setattr(module, table, {name: dict(of) for name, of in getattr(module, table).items()})
    names: dict = {"__name__": "__main__"}
    exec(compile(code, "page", "exec"), names)
    return names


def test_the_readme_example_runs_and_is_the_one_in_examples(tmp_path, monkeypatch, capsys):
    from fms.models import get_model
    from fms.models.convert import save_model
    from fms.utils.tokenizers import get_tokenizer

    code, _ = blocks(README, "python")
    assert code == (ROOT / "examples/generate.py").read_text()
    save_model(get_model("llama", "micro", nlayers=1), tmp_path / "tiny", tokenizer=get_tokenizer("char_tokenizer"))
    monkeypatch.setattr("sys.argv", ["generate.py", "tiny"])
    run(code, tmp_path, monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_readme_example_of_hugging_face_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    import torch

    from tests.tiny import write_tiny_chat

    model = write_tiny_chat(tmp_path / "model", max_position_embeddings=512)
    (model / "generation_config.json").write_text('{"max_new_tokens": 8}')
    plain, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda m: compiled.append(m) or plain(m, backend="eager"))  # without C++
    names = run(blocks(README, "python")[1], tmp_path, monkeypatch)
    assert compiled == [names["llama"]]
    assert "q: how are you? a: I am good. How about you?" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adding_a_model.md", "models.md"])
def test_code_runs(name, tmp_path, monkeypatch):
    run("\n".join(blocks(ROOT / "docs" / name, "python")), tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_imports_in_code_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


# Names


@cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_is_named_exists(page):
    for text in inline(page):
        if re.fullmatch(r"(fms|docs|tests|scripts|examples|benchmarks|notebooks)/[\w./]*", text):
            assert (ROOT / text).exists(), f"{page.name}: {text}"
        elif re.fullmatch(r"fms(\.\w+)+", text):
            assert resolves(text), f"{page.name}: {text}"


def resolves(name: str) -> bool:
    """Whether `fms.a.b` is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return bool(module) and resolves(module) and hasattr(importlib.import_module(module), attribute)
    return True


def test_resolves_notices():
    assert resolves("fms.utils.generation.generate")
    assert resolves("fms.models")
    assert not resolves("fms.models.nosuch")


def test_the_tree_names_every_file_once():
    (tree,) = (block for block in blocks(README, "") if block.startswith("fms/\n"))
    folders: list[str] = []
    named = []
    for line in tree.splitlines():
        indent, name, phrase = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line).groups()
        folders = folders[: len(indent) // 2]
        path = "/".join([*folders, name.rstrip("/")])
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        assert phrase or name == "fms/", f"{path} has no phrase"
        assert (ROOT / path).is_dir() if name.endswith("/") else (ROOT / path).is_file(), f"there is no {path}"
        named.append(path)
    files = {f.relative_to(ROOT).as_posix() for f in ROOT.glob("fms/**/*") if f.suffix == ".py" or f.name == "py.typed"}
    assert sorted(set(named)) == sorted(named), "a file is named twice"
    assert not (missing := sorted(files - set(named))), f"the README's tree lacks {', '.join(missing)}"


# Messages


def template(node: ast.AST) -> str:
    """A text as the pages quote it: … for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(template(part) or "…" for part in node.values))
    return ""


def test_quoted_messages_are_in_the_source():
    files = [ROOT / "dev.py", *ROOT.glob("fms/**/*.py")]
    known = {template(node) for file in files for node in ast.walk(ast.parse(file.read_text()))}
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^- `([^`]+)`", page, re.MULTILINE) + re.findall(r"likewise `([^`]+)`", page)
    assert len(quoted) > 50
    missing = [text for text in quoted if not any(text.removesuffix("…") in message for message in known)]
    assert not missing, "\n".join(missing)


# Generated parts


def rotary(config: Any) -> str:
    if not hasattr(config, "rope_theta"):
        return "none"
    scaling = config.rope_scaling
    return f"{config.rope_theta:.0f}" + (f", {scaling.kind} {scaling.factor:g}" if scaling else "")


def variants_table() -> str:
    import torch

    from fms.models import list_models, list_variants
    from fms.models.registry import build

    rows = [
        "| | parameters | emb_dim | layers | heads | head_dim | hidden_dim | vocabulary | positions | rotary | tied "
        "| tp |"
    ]
    rows.append("|---|" + "---:|" * 8 + "---|---|---|")
    for architecture in list_models():
        for variant in list_variants(architecture):
            with torch.device("meta"), patch.object(torch.nn.Linear, "reset_parameters"):  # slow, even on meta
                model = build(architecture, variant, {})
            c = model.config
            size = sum(p.numel() for p in model.parameters())
            tied = len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
            heads = f"{c.nheads} / {getattr(c, 'kvheads', c.nheads)}"
            positions = getattr(c, "max_positions", c.max_expected_seq_len)
            numbers = [
                f"{size:,}",
                c.emb_dim,
                c.nlayers,
                heads,
                c.head_dim,
                c.hidden_dim,
                c.src_vocab_size,
                positions,
            ]
            words = [f"{architecture} {variant}", *map(str, numbers), rotary(c), "yes" if tied else "no", degrees(c)]
            rows.append(f"| {' | '.join(words)} |")
    return "\n" + "\n".join(rows) + "\n"


def degrees(config: Any) -> str:
    """How many ranks divide the heads and the hidden dimension; key and value heads may be fewer than ranks."""
    kvheads = getattr(config, "kvheads", config.nheads)
    divide = [
        tp
        for tp in (2, 3, 4, 6, 8, 16)
        if config.nheads % tp == config.hidden_dim % tp == 0 and (kvheads % tp == 0 or tp % kvheads == 0)
    ]
    return " ".join(map(str, divide))


def families_table() -> str:
    from fms.models import list_models, list_variants
    from fms.utils.serialization.sources import list_sources

    tasks = {"classification": "classes", "question_answering": "answers in a text", "embedding": "states, vectors"}
    rows = ["| architecture | task | variants | checkpoint sources |", "|---|---|---|---|"]
    for name in list_models():
        task = next((task for end, task in tasks.items() if name.endswith(end)), "next token")
        task = "masked words" if name in ("roberta", "bert") else task
        rows.append(f"| {name} | {task} | {', '.join(list_variants(name))} | {', '.join(list_sources(name))} |")
    return "\n" + "\n".join(rows) + "\n"


def gguf_types() -> str:
    from fms.utils.serialization.gguf import _TYPES

    return ", ".join(kind.name for kind in sorted(_TYPES.values(), key=lambda kind: (kind.values, kind.bytes)))


GENERATED = [
    ("docs/models.md", "variants", variants_table),
    ("docs/models.md", "families", families_table),
    ("docs/checkpoints.md", "gguf types", gguf_types),
]


def between(name: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {name} -->).*?(?=<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize(("page", "name", "make"), GENERATED, ids=[name for _, name, _ in GENERATED])
def test_generated_parts_are_fresh(page, name, make):
    (found,) = between(name).findall((ROOT / page).read_text())
    assert found.split() == make().split(), f"{page} is out of date: {THIS}"


if __name__ == "__main__":
    for page, name, make in GENERATED:
        made = make()
        text = between(name).sub(lambda _, made=made: made, (ROOT / page).read_text())
        (ROOT / page).write_text(text)
