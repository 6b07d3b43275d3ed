"""`fms generate`: prompts from the command line, a file or standard input; text as it comes, or JSON."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms.cli.flags import nearest
from fms.cli.loading import Loaded, load, read_text, run_options

if TYPE_CHECKING:
    from fms.utils.generation import Run
    from fms.utils.tokenizers import BaseTokenizer


@dataclass(frozen=True)
class Answer:
    """What came of one prompt. `finish_reason`: eos, stop (a stop string) or length."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str


def run(args: argparse.Namespace) -> int:
    if args.system is not None and not args.chat:
        raise ValueError("--system is a part of a chat: add --chat")
    prompts = read_prompts(args)
    options = run_options(args)
    loaded = load(args)
    ids = [encode(loaded.tokenizer, prompt, args.chat, args.system) for prompt in prompts]
    if not args.batch:
        return single(loaded, prompts[0], ids[0], options, args)
    limit = loaded.model.config.max_positions
    if long := [f"{n} ({len(row)} tokens)" for n, row in enumerate(ids, 1) if len(row) >= limit]:
        raise ValueError(f"{args.batch}: too long for the model's context of {limit} tokens: prompts {', '.join(long)}")
    return batch(loaded, prompts, ids, options, args)


def single(loaded: Loaded, prompt: str, ids: list[int], options: dict[str, Any], args: argparse.Namespace) -> int:
    import torch

    from fms.utils.generation import Run, stream_run

    run: Any = Recorded(Run(loaded.model, [torch.tensor(ids)], tokenizer=loaded.tokenizer, **options))
    text = ""
    for piece in stream_run(run, loaded.tokenizer):
        text += piece
        if not args.json:
            print(piece, end="", flush=True)
    answer = Answer(prompt, text, len(ids), len(run.ids), finish_reason(run.ids, run.run, loaded.tokenizer))
    print(json.dumps(report(loaded, answer, run.run.timing), ensure_ascii=False) if args.json else "")
    if args.stats:
        stats(loaded, [answer], run.run.timing.first_token, run.run.timing.tokens_per_second)
    return 0


def batch(
    loaded: Loaded, prompts: list[str], ids: list[list[int]], options: dict[str, Any], args: argparse.Namespace
) -> int:
    answers: list[Answer] = []
    waited, seconds, later = 0.0, 0.0, 0
    for first in range(0, len(ids), args.batch_size):
        rows = slice(first, first + args.batch_size)
        found, run = answer_together(loaded, prompts[rows], ids[rows], options, first)
        for answer in found:
            if args.json:
                print(json.dumps(report(loaded, answer, run.timing), ensure_ascii=False), flush=True)
            else:
                print(f"=== {len(answers) + 1}: {answer.prompt}\n{answer.text}", flush=True)
            answers.append(answer)
        waited = waited or run.timing.first_token
        seconds += sum(run.timing.steps)
        later += sum(answer.new_tokens - 1 for answer in found)
    if args.stats:
        stats(loaded, answers, waited, later / seconds if seconds else 0.0)
    return 0


def answer_together(
    loaded: Loaded, prompts: Sequence[str], ids: Sequence[list[int]], options: dict[str, Any], first: int = 0
) -> tuple[list[Answer], "Run"]:
    """Answers to prompts that run as one batch, of which the first is number `first` in all: they draw by its seed."""
    import torch

    from fms.utils.generation import Run

    rows = [torch.tensor(row) for row in ids]
    run = Run(loaded.model, rows, tokenizer=loaded.tokenizer, first_row=first, **options)
    new: list[list[int]] = [[] for _ in ids]
    for step in run:
        for row, token in zip(new, step, strict=True):
            if token is not None:
                row.append(token)
    answers = []
    for prompt, before, row in zip(prompts, ids, new, strict=True):
        text = loaded.tokenizer.decode([token for token in row if token not in run.eos])
        ends = [at for stop in run.stop if (at := text.find(stop)) >= 0]
        reason = finish_reason(row, run, loaded.tokenizer)
        answers.append(Answer(prompt, text[: min(ends, default=None)], len(before), len(row), reason))
    return answers, run


class Recorded:
    """A run of one row that keeps the ids of its new tokens."""

    def __init__(self, run: "Run") -> None:
        self.run, self.eos, self.stop = run, run.eos, run.stop
        self.ids: list[int] = []

    def __iter__(self) -> Iterator[list[int | None]]:
        for step in self.run:
            self.ids += [token for token in step if token is not None]
            yield step


def finish_reason(new: list[int], run: "Run", tokenizer: "BaseTokenizer") -> str:
    if new and new[-1] in run.eos:
        return "eos"
    text = tokenizer.decode(new) if run.stop else ""
    return "stop" if any(stop in text for stop in run.stop) else "length"


def read_prompts(args: argparse.Namespace) -> list[str]:
    given = [name for name in ("prompt", "file", "batch") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError("give one of PROMPT, --file and --batch")
    if not given and sys.stdin.isatty():
        raise ValueError(
            'there is no prompt: fms generate "The capital of France is" --model_path ..., or - to type it'
        )
    if args.batch:
        return read_batch(args.batch)
    if args.file:
        prompt, name = read_text(args.file).removesuffix("\n"), args.file
    elif args.prompt in (None, "-"):
        prompt, name = read_text("-").removesuffix("\n"), "standard input"
    else:
        prompt, name = args.prompt, "PROMPT"
    if not prompt:
        raise ValueError(f"{name} is empty: a prompt needs at least one character")
    return [prompt]


def read_batch(file: str) -> list[str]:
    """Prompts from lines of text, or of JSON objects if the first line is one; empty lines are passed over."""
    lines = [(n, line) for n, line in enumerate(read_text(file).splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file}: there is no prompt in it")
    if not lines[0][1].lstrip().startswith("{"):
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {line[:60]!r} is not JSON: {error}") from None
        if not isinstance(record, dict) or "prompt" not in record:
            near = nearest("prompt", record) if isinstance(record, dict) else ""
            raise ValueError(f'{file}:{number}: {line[:60]!r} is not a JSON object with a "prompt"{near}')
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{file}:{number}: the prompt is {prompt!r}, it must be text that is not empty")
        prompts.append(prompt)
    return prompts


def encode(tokenizer: "BaseTokenizer", prompt: str, chat: bool, system: str | None) -> list[int]:
    from fms.utils.prompts import encode_prompt

    if not chat:
        return encode_prompt(tokenizer, prompt)
    first = [{"role": "system", "content": system}] if system else []
    return tokenizer.apply_chat_template([*first, {"role": "user", "content": prompt}])


def report(loaded: Loaded, answer: Answer, timing: Any) -> dict[str, Any]:
    """One answer for JSON; all times are seconds."""
    seconds = {"load": loaded.seconds, "first_token": timing.first_token, "total": timing.total}
    return asdict(answer) | {"seconds": seconds, "tokens_per_second": timing.tokens_per_second}


def stats(loaded: Loaded, answers: Sequence[Answer], first_token: float, tokens_per_second: float) -> None:
    before, new = sum(a.prompt_tokens for a in answers), sum(a.new_tokens for a in answers)
    ended = f", ended by {answers[0].finish_reason}" if len(answers) == 1 else f" of {len(answers)} prompts"
    peak, of = peak_memory(loaded.device)
    dtype = str(loaded.model.embedding.weight.dtype).removeprefix("torch.")
    print(
        f"tokens: {before} in, {new} out{ended}\n"
        f"speed: {tokens_per_second:.1f} tokens/s, the first after {first_token:.2f} s\n"
        f"memory: {peak / 1e9:.2f} GB of the {of} at the peak\n"
        f"loading: {loaded.seconds:.2f} s ({loaded.device}, {dtype})",
        file=sys.stderr,
    )


def peak_memory(device: Any) -> tuple[int, str]:
    """Bytes, and whose they are: the GPU's, or the process's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device), "GPU"
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024, "process"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
