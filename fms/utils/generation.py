"""From a prompt to new tokens: prefill, then one decode step again and again."""

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fms.modules.cache import StaticCache
from fms.modules.frozen import Frozen
from fms.modules.rolling import RollingCache
from fms.utils.capture import CapturedStep, keep, kept
from fms.utils.measure import Timing
from fms.utils.prompts import check_ids, encode_prompt, rows_of
from fms.utils.sampling import choose, ends_of, penalise, sampling_of, seen_of, share_of
from fms.utils.tokenizers import BaseTokenizer

PREFILL_CHUNK = 2048  # tokens a row that go through the model at once
AHEAD = 2  # captured steps that are queued beyond the one whose tokens the host waits for
WORTH_CAPTURING = 16  # new tokens; capturing takes about as long as three plain steps
Tokens = Sequence[int] | Tensor
BeforeStep = Callable[[int, Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]
AfterStep = Callable[[int, Tensor, Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]


def generate(
    model: Any,
    input_ids: Tensor | Sequence[Tokens] | Sequence[str] | str,
    max_seq_len: int | None = None,
    max_new_tokens: int | None = None,
    *,
    tokenizer: BaseTokenizer | None = None,
    cache: StaticCache | None = None,
    use_cache: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop: str | Sequence[str] = (),
    timing: str = "",
    prepare_model_inputs_hook: BeforeStep | None = None,
    post_iteration_hook: AfterStep | None = None,
    capture: bool | None = None,
    compile: str | None = None,
    **sampling: Any,
) -> Any:
    """Continue `input_ids`, and return what went in with what came out, in the form that it went in.

    A tensor (b, s) or (s) gives a tensor of prompt and new tokens, rows that ended early padded on the right. A
    sequence of rows of unequal lengths gives a list of 1-D tensors. A text or texts, which need a `tokenizer`, give the
    new text only.

    `max_new_tokens` (256) and `max_seq_len` (the model's) bound the new and all tokens. `sampling`: do_sample,
    temperature, top_k, top_p, min_p, repetition_penalty, seed, as in `Sampling`. What is not given comes from the
    `generation_config.json` that lay beside the weights, else it is greedy; temperature, top_k, top_p, min_p or seed
    given here mean do_sample. A row ends at one of `eos_token_id`, or when its text has one of the `stop` strings; it
    gives the same tokens as it would alone, and its text ends before them. `cache` holds what came before and is
    continued: `input_ids` are what it has not seen yet, the last token that came out included. `use_cache=False`
    computes everything anew for each token.

    On a GPU the decode step of a frozen model is captured as a CUDA graph where that can be done and is worth it; the
    model's next call has it, with its cache of up to a GiB, if it fits, and with graphs of prompts that come often.
    `capture=False` launches each kernel by itself, `capture=True` raises `ValueError` where it can't be done.
    `compile` ("none", "blocks", "max") compiles the model first, as `get_model(compile=...)` does; it stays so.

    `timing="per-token"` or `"e2e"` makes it (result, list of seconds). Hooks run around each step:
    `prepare_model_inputs_hook(step, input_ids, kwargs)` returns both of the latter for the model,
    `post_iteration_hook(length, logits, tokens, kwargs)` the tokens (b, 1) and kwargs.

    Raises `ValueError` for a prompt that is empty or too long, ids outside the vocabulary, logits that are not finite.
    """
    if timing not in ("", "per-token", "e2e"):
        raise ValueError(f"timing={timing!r} must be 'per-token', 'e2e' or empty")
    prompts, back = rows_of(input_ids, tokenizer)
    if compile is not None:
        model.compile_as(compile)
    run = Run(
        model,
        prompts,
        max_seq_len=max_seq_len,
        max_new_tokens=max_new_tokens,
        tokenizer=tokenizer,
        cache=cache,
        use_cache=use_cache,
        eos_token_id=eos_token_id,
        stop=stop,
        before=prepare_model_inputs_hook,
        after=post_iteration_hook,
        capture=capture,
        **sampling,
    )
    new: list[list[int]] = [[] for _ in prompts]
    for step in run:
        for row, token in zip(new, step, strict=True):
            if token is not None:
                row.append(token)
    pad = pad_token_id if pad_token_id is not None else run.defaults.get("pad_token_id")
    if pad is None:
        pad = min(run.eos, default=0)
    result = back(run, new, pad)
    if timing:
        return result, [run.timing.total] if timing == "e2e" else [run.timing.first_token, *run.timing.steps]
    return result


def stream(model: Any, prompt: str | Sequence[int], tokenizer: BaseTokenizer, **options: Any) -> Iterator[str]:
    """The new text of one prompt, piece by piece as it comes; options as for `generate`. Pieces never split a
    character, and a stop string is never shown."""
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    return stream_run(Run(model, [torch.tensor(ids)], tokenizer=tokenizer, **options), tokenizer)


def stream_run(run: "Run", tokenizer: BaseTokenizer) -> Iterator[str]:
    """The text of a run of one row, as it comes."""
    decoder, held = tokenizer.stream(), ""
    stops = run.stop

    def ready(text: str, last: bool) -> tuple[str, str]:
        """What may be shown, and what may yet turn out to begin a stop string."""
        found = [at for s in stops if (at := text.find(s)) >= 0]
        if found:
            return text[: min(found)], ""
        if last:
            return text, ""
        keep = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - keep], text[len(text) - keep :]

    for (token,) in run:
        if token is not None and token not in run.eos:
            held += decoder.put(token)
            stopped = any(s in held for s in stops)
            shown, held = ready(held, False)
            if shown:
                yield shown
            if stopped:
                return
    shown, _ = ready(held + decoder.finish(), True)
    if shown:
        yield shown


class Run:
    """One generation: iterate to get, at each step, the new token of each row, or `None` for a row that has ended.

    `prompts` are 1-D tensors of ids. `timing` fills up on the way. Options are those of `generate`; rows draw as those
    from number `first_row` on of a larger batch would.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tensor],
        *,
        max_seq_len: int | None = None,
        max_new_tokens: int | None = None,
        tokenizer: BaseTokenizer | None = None,
        cache: Any = None,
        use_cache: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        before: BeforeStep | None = None,
        after: AfterStep | None = None,
        capture: bool | None = None,
        first_row: int = 0,
        **sampling: Any,
    ):
        if not getattr(model, "causal", True):
            raise ValueError("an encoder can't generate text: it says nothing of the next token")
        self.model, self.tokenizer, self.before, self.after = model, tokenizer, before, after
        self.defaults: dict[str, Any] = getattr(model, "generation_defaults", {})
        how = sampling_of(sampling, self.defaults, inspect.signature(generate).parameters)
        self.how = replace(how, seed=how.seed + first_row)
        self.eos = ends_of(eos_token_id, self.defaults, tokenizer)
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        if self.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if "" in self.stop:
            raise ValueError("stop strings must not be empty")
        self.timing = Timing()
        self.share = share_of(model.head) if after is None else None  # a hook sees whole logits
        self.device = model.embedding.weight.device
        check_ids(prompts, model.config.src_vocab_size)
        self.prompts = [p.to(self.device) for p in prompts]
        self.lengths = [len(p) for p in prompts]

        held = [0] * len(prompts) if cache is None else cache.held()
        longest = max(held) + max(self.lengths)
        limit = min(max_seq_len or model.config.max_positions, model.config.max_positions)
        if cache is not None:
            limit = min(limit, cache.max_len)
        if longest >= limit:
            raise ValueError(f"the prompt has {longest} tokens and leaves no room for a new one: the limit is {limit}")
        wanted = max_new_tokens if max_new_tokens is not None else self.defaults.get("max_new_tokens", 256)
        if wanted < 1:
            raise ValueError(f"max_new_tokens={wanted} must be at least 1")
        if cache is not None and not use_cache:
            raise ValueError("use_cache=False contradicts the cache that is given")
        if cache is not None and cache.batch != len(prompts):
            raise ValueError(f"the cache has {cache.batch} rows, the prompts are {len(prompts)}")
        if cache is not None:
            cache.rewind(cache.held())  # give back what padding of earlier runs took
        self.first = [h + n for h, n in zip(held, self.lengths, strict=True)]  # places of the first new tokens
        self.room = [min(wanted, limit - first) for first in self.first]  # new tokens a row
        self.max_new_tokens = max(self.room) if cache is None else min(max(self.room), cache.max_len - longest)
        self.span = torch.tensor([[f + n] for f, n in zip(self.first, self.room, strict=True)], device=self.device)
        self.continued = cache is not None  # by whoever gave it
        worth = capture or (capture is None and self.max_new_tokens >= WORTH_CAPTURING)
        self.step: Any = None
        if cache is None and use_cache:
            end = longest + self.max_new_tokens
            b, room = len(prompts), (min(end, limit), max(end - limit, 0))
            self.step = kept(model, b, end, self.how, self.eos) if worth else None
            cache = self.step.cache if self.step else model.make_cache(b, *room)
            cache.span = self.span
        self.cache = cache
        obstacle = self._obstacle()
        if capture and obstacle:
            raise ValueError(f"capture=True: the decode step can't be captured {obstacle}")
        self.capture = not obstacle and worth
        self.step = (self.step or CapturedStep(model, self.cache, self.how, self.eos)) if self.capture else None

    def _obstacle(self) -> str:
        """Why the decode step can't be captured."""
        if self.device.type != "cuda":
            return f"on {self.device.type}: it takes a CUDA device"
        if not isinstance(self.cache, StaticCache | RollingCache):
            return f"with {type(self.cache).__name__ if self.cache else 'no cache'}: it takes one of a fixed size"
        if self.continued and isinstance(self.cache, RollingCache):
            return "with a RollingCache that goes on: steps ahead of the text's end push out what it must keep"
        if not all(isinstance(layer, Frozen) for layer in self.model.layers):
            return "of a model that is not frozen: call freeze(model)"
        if self.before or self.after or any(b._forward_hooks or b._forward_pre_hooks for b in self.model.layers):
            return "with hooks"
        if (mode := getattr(self.model, "compiled", "none")) in ("reduce-overhead", "max-autotune"):
            return f"of a model compiled with {mode!r}, which makes graphs of its own"
        if self.share is not None and self.share.comm.backend != "nccl":
            return f"of a model whose ranks sum by {self.share.comm.backend}: it takes nccl"
        return ""

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[int | None]]:
        self.ended = ended = [False] * len(self.prompts)
        self.given = [0] * len(self.prompts)  # new tokens a row
        texts = [self.tokenizer.stream() for _ in self.prompts] if self.stop and self.tokenizer else []
        tails = [""] * len(self.prompts)
        began = time.perf_counter()
        for i, (tokens, fit) in enumerate(self._tokens()):
            step: list[int | None] = []
            for r, (token, good) in enumerate(zip(tokens, fit, strict=True)):
                if not good and not ended[r]:
                    raise ValueError(
                        f"row {r}: logits are not finite at new token {i + 1}: look at the weights "
                        "(get_model(..., check_finite=True)) and the data type"
                    )
                step.append(None if ended[r] else token)
                if ended[r]:
                    continue
                self.given[r] += 1
                ended[r] = token in self.eos or i + 1 == self.room[r]
                if texts:
                    tails[r] += texts[r].put(token)
                    ended[r] |= any(s in tails[r] for s in self.stop)
                    tails[r] = tails[r][-max(map(len, self.stop)) :]
            now = time.perf_counter()
            if i == 0:
                self.timing.first_token = now - began
            else:
                self.timing.steps.append(now - began)
            yield step
            if all(ended):
                break
            began = time.perf_counter()

    def _tokens(self) -> Iterator[tuple[list[int], list[bool]]]:
        """Of each step the new tokens, and whether their logits were fit for use. Looks at `ended` in between."""
        rows = torch.arange(len(self.prompts), device=self.device)
        start = torch.tensor(self.first, device=self.device)
        seen = seen_of(self.prompts, self.how, self.model.config.src_vocab_size)
        logits, kwargs = self._prefill()
        for i in range(self.max_new_tokens):
            if seen is not None:
                logits = penalise(logits, seen, self.how.repetition_penalty, self.share)
            tokens, fit = choose(logits, self.how, rows, start + i, self.share)
            if self.after is not None:
                changed, kwargs = self.after(max(self.lengths) + i, logits, tokens[:, None], kwargs)
                tokens = changed.flatten()
            if seen is not None:
                seen[rows, tokens] = True
            if self.capture:
                yield from self._captured(tokens, fit, seen)
                return
            yield tokens.tolist(), fit.tolist()
            if i + 1 == self.max_new_tokens:
                return
            if any(self.ended) and self.cache is not None:
                self.cache.take = torch.tensor([[int(not end)] for end in self.ended], device=self.device)
            logits, kwargs = self._decode(i + 1, tokens[:, None], kwargs, self.ended)

    def _captured(self, tokens: Tensor, fits: Tensor, seen: Tensor | None) -> Iterator[tuple[list[int], list[bool]]]:
        """What `_tokens` gives, from the first ones on: the device runs ahead, the host reads late."""
        step, left, found = self.step, self.max_new_tokens - 1, fits.tolist()
        coming: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        fit = all(found)
        try:
            yield tokens.tolist(), found
            if left:
                step.begin(tokens, [first + room for first, room in zip(self.first, self.room, strict=True)], seen)
            while left or coming:
                while left and len(coming) <= AHEAD:
                    step.replay()
                    host, there = torch.empty(len(tokens), dtype=torch.long, pin_memory=True), torch.cuda.Event()
                    host.copy_(step.tokens, non_blocking=True)
                    there.record()
                    coming.append((host, there))
                    left -= 1
                host, there = coming.popleft()
                there.synchronize()
                new = host.tolist()
                fit = min(new) >= 0
                yield new, [token >= 0 for token in new]
        finally:
            step.finish([first + given - 1 for first, given in zip(self.first, self.given, strict=True)])
            if fit and step.graph is not None and not self.continued:
                self.step = self.cache = None
                keep(step)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a row's new tokens, without the token or the string that ended it."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode([token for token in tokens if token not in self.eos])
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]

    def _prefill(self) -> tuple[Tensor, dict[str, Any]]:
        """Logits (b, vocabulary) behind each row's last token; shorter rows are padded on the right."""
        self.timing.prompt_tokens = sum(self.lengths)
        self.whole = torch.nn.utils.rnn.pad_sequence(list(self.prompts), batch_first=True)
        if self.cache is None:
            return self._step(0, self.whole, {})
        longest = max(self.lengths)
        whole = self.capture and not self.continued and longest <= PREFILL_CHUNK
        if whole and (logits := self.step.prefill(self.whole, self.lengths)) is not None:
            return logits, {"cache": self.cache}
        width = longest if self.before else PREFILL_CHUNK  # a hook sees the whole prompt
        if min(self.lengths) == longest:
            *chunks, rest = self.whole.split(width, 1)
            for chunk in chunks:
                self.model.hidden(chunk, cache=self.cache, last_n_tokens=1)
            return self._step(0, rest, {"cache": self.cache})
        ends = torch.tensor(self.lengths, device=self.device) - 1
        last: Any = None
        for first in range(0, longest, width):
            self.cache.take = (ends[:, None] + 1 - first).clamp(0, width)
            chunk, kwargs = self.whole[:, first : first + width], {"cache": self.cache}
            if self.before is not None:
                chunk, kwargs = self.before(0, chunk, kwargs)
            h = self.model.hidden(chunk, **kwargs)
            inside = (ends >= first) & (ends < first + h.shape[1])
            here = h[torch.arange(len(h), device=h.device), (ends - first).clamp(0, h.shape[1] - 1)]
            last = here if last is None else torch.where(inside[:, None], here, last)
        return self._logits(last), kwargs

    def _decode(
        self, i: int, tokens: Tensor, kwargs: dict[str, Any], ended: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits (b, vocabulary) after one more token (b, 1) a row."""
        if self.cache is not None:
            return self._step(i, tokens, kwargs)
        width = i + max(n for n, end in zip(self.lengths, ended, strict=True) if not end)
        self.whole = torch.nn.functional.pad(self.whole, (0, max(0, width - self.whole.shape[1])))[:, :width]
        self.whole[torch.arange(len(tokens), device=self.device), self._last(i)] = tokens[:, 0]
        return self._step(i, self.whole, kwargs)

    def _logits(self, h: Tensor) -> Tensor:
        return self.model.head(h) if self.share is None else self.model.head.local(h)

    def _last(self, i: int) -> Tensor:
        """The place (b) in `whole` of each row's last token after i new ones; rows that have ended may be cut off."""
        return (torch.tensor(self.lengths, device=self.device) + i - 1).clamp(max=self.whole.shape[1] - 1)

    def _step(self, i: int, input_ids: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if self.before is not None:
            input_ids, kwargs = self.before(i, input_ids, kwargs)
        if self.cache is not None:
            return self.model(input_ids, last_n_tokens=1, local=self.share is not None, **kwargs)[:, -1], kwargs
        anew = self.model.no_cache(self.span)
        h = self.model.hidden(input_ids, **({"cache": anew} | kwargs))
        return self._logits(h[torch.arange(len(h), device=h.device), self._last(i)]), kwargs
