"""Time and memory of inference, cell by cell: a way to run x one token or a generation x with or without a cache."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fms.utils.capture import COME_OFTEN, CapturedStep, forget
from fms.utils.devices import is_out_of_memory
from fms.utils.generation import PREFILL_CHUNK, Run, generate
from fms.utils.measure import peak, reset_peak, step_bytes, synchronise, trace
from fms.utils.sampling import Sampling, choose, share_of

FAILED = "does not compile"
TASKS = ("single", "e2e")
STEPS = 32  # that a figure of single tokens is the mean of, at most
# how far logits of two ways to compute may lie apart, in standard deviations of the logits, by 32 layers; by more, as
# far as roundings add up that have nothing to do with each other
NEAR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


class Mode(NamedTuple):
    """A way to run. `captured`: the decode step as a CUDA graph, cached only; `plain`: attention as products and a
    softmax, not SDPA, without a cache only (decode steps choose kernels of their own)."""

    name: str
    compiled: bool = False
    captured: bool = False
    plain: bool = False

    def has(self, cached: bool) -> bool:
        return not (self.plain if cached else self.captured)


EAGER, PLAIN, CAPTURED = Mode("eager"), Mode("eager, plain attention", plain=True), Mode("captured", captured=True)
COMPILED, BOTH = Mode("compiled", compiled=True), Mode("compiled, captured", compiled=True, captured=True)
MODES = (EAGER, PLAIN, CAPTURED, COMPILED, BOTH)


@dataclass(frozen=True)
class Cell:
    """One figure of the table, and what belongs to it. What was not measured is `None`, and `note` says why.

    `task`: "single" is one more token behind a prompt of `seq_len`, "e2e" a generation of `new_tokens`, the prompt's
    forward included. `ms` is of one token of every row, the median of `repeats`; `tokens_per_second` counts all rows;
    `first` is the milliseconds until the first token of a generation is there, their median, too.
    `bytes` is what a token must read on this rank, weights and cache; `share` how near that comes to the bandwidth
    (1: as fast as memory can be read). `allocated` and `reserved` are bytes at the peak, `warm_up` the seconds of all
    that ran before it was measured.
    """

    mode: str
    task: str
    cached: bool
    batch_size: int
    seq_len: int
    new_tokens: int
    ms: float | None = None
    repeats: tuple[float, ...] = ()
    tokens_per_second: float | None = None
    first: float | None = None
    bytes: int | None = None
    share: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    warm_up: float | None = None
    check: str = ""
    note: str = ""

    @property
    def wrong(self) -> bool:
        return self.check.startswith("differs") or self.note.startswith(FAILED)

    @property
    def name(self) -> str:
        words = [self.mode.replace(", ", "-").replace(" ", "-"), self.task, "cached" if self.cached else "uncached"]
        return "-".join([*words, f"b{self.batch_size}", f"s{self.seq_len}"])


class Bench:
    """Measures a frozen model on prompts of one size, which are the same on every rank.

    Made while the model is not compiled yet: with `check`, cells are compared with what it computes then.
    `bandwidth` is in bytes a second; ids are drawn from the first `vocab`. Raises `ValueError` where the tokens are
    more than the model's positions.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int,
        seq_len: int,
        new_tokens: int,
        *,
        repeats: int = 3,
        bandwidth: float | None = None,
        check: bool = True,
        vocab: int | None = None,
    ):
        if not model.causal:
            raise ValueError("an encoder makes no tokens: the benchmark is of models that do")
        if (total := seq_len + new_tokens) > (limit := model.config.max_positions):
            raise ValueError(
                f"seq_len={seq_len} and max_new_tokens={new_tokens} are {total} tokens, more than the {limit} that "
                "this model was made for"
            )
        self.model, self.batch, self.length, self.new = model, batch_size, seq_len, new_tokens
        self.steps = min(new_tokens, STEPS)
        self.repeats, self.bandwidth, self.check = repeats, bandwidth, check
        self.device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
        self.near = NEAR[dtype] * max(model.config.nlayers / 32, 1) ** 0.5
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab or model.config.src_vocab_size, (batch_size, seq_len + 1), generator=random)
        self.ids = ids.to(self.device)
        self.firsts: list[float] = []  # seconds until the first token, of each generation so far
        self.expected = self._attempt(self._expect) if check else None

    def cell(self, mode: Mode, task: str, cached: bool, profile: Path | None = None) -> Cell:
        """Warm up, check, measure; with `profile`, a trace of one run more in that directory. A cell without memory
        or without a way to run says so in its note."""
        forget(self.model)  # or a cell would hold the cache of the one before
        empty = Cell(mode.name, task, cached, self.batch, self.length, self.new)
        if mode.captured and self.device.type != "cuda":
            return replace(empty, note="needs a GPU")
        try:
            done = self._attempt(lambda: self._measure(mode, empty, profile))
        except ValueError as error:
            if not mode.captured:
                raise
            return replace(empty, note=str(error).splitlines()[0])
        except RuntimeError as error:
            if not (mode.compiled and _is_of_the_compiler(error)):
                raise
            cause = getattr(error, "inner_exception", error)
            reason = next(iter(str(cause).splitlines()), "")
            return replace(empty, note=f"{FAILED}: {type(cause).__name__}: {reason}")
        return done or replace(empty, note="out of memory")

    def _attempt(self, call: Callable[[], Any]) -> Any:
        """What it returns, or `None` if any rank was out of memory."""
        result, short = None, 0
        try:
            with torch.inference_mode():
                result = call()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            short = 1
        comm = self.model.comm
        if comm is not None:
            short = int(comm.sum(torch.tensor(short, device=self.device)))
        if not short:
            return result
        del result
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _measure(self, mode: Mode, cell: Cell, profile: Path | None) -> Cell:
        # decode steps of captured cells lengthen the cache, as a generation does
        single = cell.task == "single"
        steps = self.steps if single else self.new
        make: Any = self._generation if not single else self._replayed if mode.captured else self._step
        with sdpa_kernel(SDPBackend.MATH) if mode.plain else contextlib.nullcontext():
            start = time.perf_counter()
            run, once = make(mode, cell.cached)
            made = run()
            if mode.captured and not single:
                for _ in range(COME_OFTEN - 1):
                    run(2)  # until the prompt's forward is captured, too, if it is to be
                made = run()
            synchronise(self.device)
            warm_up = time.perf_counter() - start
            checked = self._compare(once() if made is None else made) if self.check else ""
            reset_peak(self.device)
            repeats = tuple(self._timed(run) / steps * 1e3 for _ in range(self.repeats))
            allocated, reserved = peak(self.device)
            firsts = self.firsts[-self.repeats :]
            if profile is not None:
                trace(run, profile / f"{cell.name}.json", self.device)
        ms = statistics.median(repeats)
        grown = 1 if single and not mode.captured else (steps + 1) // 2  # over the prompt, on average
        read = step_bytes(self.model, self.batch, self.length + grown) if cell.cached else None
        return replace(
            cell,
            ms=ms,
            repeats=repeats,
            tokens_per_second=self.batch / ms * 1e3,
            first=None if single else statistics.median(firsts) * 1e3,
            bytes=read,
            share=read / self.bandwidth / ms * 1e3 if read and self.bandwidth else None,
            allocated=allocated,
            reserved=reserved,
            warm_up=warm_up,
            check=checked,
        )

    def _timed(self, run: Callable[[], Any]) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        run()
        synchronise(self.device)
        return time.perf_counter() - start

    # What runs: a function for the stopwatch, and one whose result is compared

    def _step(self, mode: Mode, cached: bool) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
        """The same token again and again."""
        cache = self._prefilled(self.length + 1) if cached else None
        given, share = self.ids[:, -1:] if cached else self.ids, share_of(self.model.head)
        rows = torch.arange(self.batch, device=self.device)

        def logits(local: bool) -> Tensor:
            if cache is not None:
                cache.length = self.length  # the token takes its own place again
            return self.model(given, cache=cache, last_n_tokens=1, local=local)[:, -1]

        def run() -> None:
            for _ in range(self.steps):
                choose(logits(share is not None), Sampling(), rows, rows, share)
                synchronise(self.device)

        return run, lambda: logits(False)

    def _replayed(self, mode: Mode, cached: bool) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
        Run(self.model, list(self.ids[:, :-1]), max_new_tokens=self.new, capture=True)  # raises where it can't be
        cache, last = self._prefilled(self.length + self.steps), self.ids[:, -1]
        step = CapturedStep(self.model, cache)
        ends = torch.full((self.batch,), self.length + self.steps, device=self.device)

        def run() -> None:
            step.begin(last, ends)
            for _ in range(self.steps):
                step.replay()
                synchronise(self.device)
            step.finish([self.length] * self.batch)

        def once() -> Tensor:
            step.begin(last, ends)
            step.replay()
            tokens = step.tokens.clone()
            step.finish([self.length] * self.batch)
            return tokens

        return run, once

    def _generation(self, mode: Mode, cached: bool) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
        def run(most: int = self.new) -> Tensor:
            tokens, (first, *_) = generate(
                self.model,
                self.ids[:, :-1],
                max_new_tokens=min(most, self.new),
                use_cache=cached,
                capture=mode.captured,
                eos_token_id=(),
                do_sample=False,
                repetition_penalty=1.0,
                timing="per-token",
            )
            self.firsts.append(first)
            return tokens

        return run, run

    def _prefilled(self, room: int) -> Any:
        cache = self.model.make_cache(self.batch, room)
        *chunks, rest = self.ids[:, :-1].split(PREFILL_CHUNK, 1)
        for chunk in chunks:
            self.model.hidden(chunk, cache=cache, last_n_tokens=1)
        self.model(rest, cache=cache, last_n_tokens=1)
        return cache

    # What is right: the logits behind all ids, without a cache, and a generation with one

    def _expect(self) -> tuple[Tensor, Tensor]:
        logits = self.model(self.ids, last_n_tokens=1)[:, -1]
        return logits, self._generation(EAGER, True)[0]()

    def _compare(self, got: Tensor) -> str:
        """Whether it is "same", "near" for what rounding explains, or "differs ..." and where.

        Of logits (b, vocabulary), of the token that follows (b), or of prompts with what was generated (b, n).
        """
        if self.expected is None:
            return ""
        logits, tokens = self.expected
        if got.is_floating_point():
            apart = (got.double() - logits.double()).abs().max() / logits.double().std()
            if not apart <= self.near:
                return f"differs by {apart:.2g} standard deviations of the logits"
            return "same" if apart == 0 else "near"
        if got.dim() == 1:
            return self._tie(logits, logits.argmax(-1), got, "after the prompt")
        words = []
        for row, (want, have) in enumerate(zip(tokens, got, strict=True)):
            if different := (want != have).nonzero().flatten().tolist():
                at = different[0]
                here = self.model(want[None, :at], last_n_tokens=1)[:, -1]
                where = f"in row {row} at new token {at - self.length + 1}"
                words.append(self._tie(here, want[at : at + 1], have[at : at + 1], where))
        return max(words, key=lambda word: word.startswith("differs"), default="same")

    def _tie(self, logits: Tensor, want: Tensor, got: Tensor, where: str) -> str:
        """Whether other tokens are as likely."""
        if torch.equal(want, got):
            return "same"
        gap = (logits.gather(1, want[:, None]) - logits.gather(1, got.clamp(min=0)[:, None])).double().abs().max()
        gap = gap / logits.double().std()
        return "near" if gap <= self.near and int(got.min()) >= 0 else f"differs {where}"


def _is_of_the_compiler(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # takes long

    return isinstance(error, TorchDynamoException)
