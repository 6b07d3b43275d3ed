"""The decode step as a CUDA graph: from the last token of each row to the next, without the host. And the prefill of
prompts so short that the host takes longer than the device."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache as cached
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fms.kernels.attend import planned
from fms.kernels.next_token import choose_greedily, make_rows, move_on, stop
from fms.kernels.sum_add import ROWS
from fms.modules.cache import StaticCache
from fms.modules.moe import MixtureOfExperts, SharedExpert
from fms.modules.rolling import RollingCache
from fms.utils.devices import is_out_of_memory
from fms.utils.sampling import Sampling, choose, penalise, share_of

_ran: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()  # of a model, the kinds of step that have been captured
KEPT = 1 << 30  # bytes: the largest cache that is kept with its step
WIDTH = 8  # of prompts: they are padded to multiples of it, each with a graph of its own
COME_OFTEN = 8  # prompts of a width that launching took about as much longer for as planning and capturing it takes
GRAPHS = 64  # of prompts, at most
# Tokens of all rows times weights of a block up to which the device has run it, in 0.35 ms at 700 TFLOP/s, before the
# host has launched the next.
LAUNCHED_LATE = 1.2e11


@dataclass
class Prompts:
    """Prompts of one width: `ids` (b, width), and the place (b) of each row's last token among the `last` ones, or if
    that is 0 among all. Of a graph, the logits (b, vocabulary or this rank's share) behind it. `times`: how often such
    prompts have come."""

    ids: Tensor
    places: Tensor
    last: int
    times: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None


class CapturedStep:
    """Feeds each row's last token to the model and chooses the next. All it needs lies, and is moved on, on the device.

    `begin`, then `replay` for each token, then `finish`; before them `prefill`, if the cache is empty. A row that ends,
    at a token of `eos` or when it is full, feeds no more: what it is given from there on is not its own, and its length
    in the cache stays.
    """

    def __init__(
        self,
        model: Any,
        cache: StaticCache | RollingCache,
        how: Sampling | None = None,
        eos: Collection[int] = (),
    ):
        self.model, self.cache, self.how, self.eos = model, cache, how or Sampling(), sorted(eos)
        self.share = share_of(model.head)
        self.peers = None
        if self.share is not None and cache.batch <= ROWS:
            everywhere = model.config.src_vocab_size > self.share.size * (self.share.comm.size - 1)
            self.peers = self.share.comm.peers if everywhere else None  # else a rank has no logits
        self.rows = make_rows(cache.batch, self.eos, cache.device)
        self.numbers = torch.arange(cache.batch, device=cache.device)
        self.seen: Tensor | None = None  # (b, vocabulary): the tokens that a repetition penalty is for
        if self.how.repetition_penalty != 1:
            self.seen = torch.zeros(cache.batch, model.config.src_vocab_size, dtype=torch.bool, device=cache.device)
        self.angles: Tensor | None = None  # (2, b or 1, max_len, 1, head_dim): cos and sin of all positions
        self.span: Any = None  # of which they are
        self.prompts: dict[tuple[int, bool], Prompts] = {}  # by width and whether all rows are as long
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: Any = None  # on which it last ran
        self.lasts = True  # no collective of NCCL's is in it, which waits at its end for all graphs that it is in

    @property
    def tokens(self) -> Tensor:
        """The newest (b); -1 where logits were not finite."""
        return self.rows.tokens

    def begin(self, tokens: Tensor, ends: Sequence[int] | Tensor, seen: Tensor | None = None) -> None:
        """Go on behind what the cache holds with each row's last `tokens` (b); a row has at most ends[row] tokens.

        With a repetition penalty `seen` (b, vocabulary; bool) are those that a row has had, these included.
        """
        rows = self.rows
        if self.seen is not None:
            assert seen is not None
            self.seen.copy_(seen)
        rows.lengths.copy_(torch.tensor(self.cache.held())[:, None])
        rows.ends.copy_(torch.as_tensor(ends).view(-1, 1))
        rows.fed.copy_(tokens.view(-1, 1))
        self.cache.lengths, self.cache.steady = rows.lengths, True
        rows.going.fill_(1)
        stop(rows)
        self._make_angles()
        if self.graph is None:
            self.kind, self.made_of = self._kind(), _made_of(self.model)
            self._capture()

    def replay(self) -> None:
        """Choose one more token a row: `tokens` once the device has come so far."""
        assert self.graph is not None
        self.graph.replay()

    def finish(self, lengths: Sequence[int]) -> None:
        """Leave the cache to others, its rows holding these numbers of tokens."""
        self.cache.hold(lengths)

    def prefill(self, ids: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Fill the empty cache with prompts `ids` (b, s), rows of these lengths padded on the right: logits (b,
        vocabulary, or this rank's share) behind each row's last token. Once such a width has come often it is a graph.
        `None`, and nothing is done, where that is not worth it or can't be."""
        b, s = ids.shape
        width = min(-(-s // WIDTH) * WIDTH, self.cache.max_len, self.model.config.max_positions)
        if not self._late(width):
            return None
        self._make_angles()
        even = min(lengths) == s  # then the last block need not compute the tokens before
        prompts = self.prompts.pop((width, even), None)
        if prompts is None:
            last = min(WIDTH, width) if even else 0
            prompts = Prompts(ids.new_zeros(b, width), torch.zeros(b, dtype=torch.long, device=ids.device), last)
        self.prompts[width, even] = prompts  # behind all others
        prompts.times += 1
        prompts.ids.copy_(F.pad(ids, (0, width - s)))
        prompts.places.copy_(torch.tensor(lengths) - 1 - (width - prompts.last if even else 0))
        if prompts.graph is not None:
            self.cache.hold(lengths)  # now: it may wait for what is queued
            prompts.graph.replay()
            return prompts.logits
        logits = self._capture_prompts(prompts) if prompts.times >= COME_OFTEN else self._prefill(prompts)
        self.cache.hold(lengths)
        return logits

    def _capture_prompts(self, prompts: Prompts) -> Tensor:
        """The logits, by plain launches once more, and from now on a graph."""
        before = self._through_backend()
        with planned():
            logits = self._prefill(prompts)
            if self._through_backend() != before:
                return logits  # what NCCL takes part in can't be kept

            def run() -> None:
                prompts.logits = self._prefill(prompts)

            captured = [other for other in self.prompts.values() if other.graph is not None]
            if len(captured) == GRAPHS:
                captured[0].graph, captured[0].logits, captured[0].times = None, None, 0
            torch.cuda.empty_cache()  # of what plain launches left: a graph has memory of its own
            try:
                prompts.graph = self._graph(run)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                prompts.times = 0
        return logits

    def _late(self, width: int) -> bool:
        """Whether the host takes longer to launch the prefill of such prompts than the device to run it."""
        model, cache = self.model, self.cache
        if not isinstance(cache, StaticCache) or cache.length:
            return False
        if getattr(model, "compiled", "none") != "none":
            return False  # it may compile again
        if any(isinstance(block.ff, MixtureOfExperts | SharedExpert) for block in model.layers):
            return False  # the host may wait for how many rows an expert has
        weights = sum(getattr(p, "_local_tensor", p).numel() for p in model.layers[0].parameters())
        return cache.batch * width * weights <= LAUNCHED_LATE

    def _prefill(self, prompts: Prompts) -> Tensor:
        self.cache.hold([0] * self.cache.batch)
        angles: Any = None
        if self.angles is not None:
            angles = [t.contiguous() for t in self.angles[:, :, : prompts.ids.shape[1]]]
        h = self.model.hidden(prompts.ids, cache=self.cache, angles=angles, last_n_tokens=prompts.last)
        h = h[self.numbers, prompts.places]
        return self.model.head(h) if self.share is None else self.model.head.local(h)

    def _capture(self) -> None:
        state = [self.rows.lengths, self.rows.going, self.rows.fed, *([] if self.seen is None else [self.seen])]
        kinds = _ran.setdefault(self.model, set())
        if self.kind not in kinds:
            kept = [t.clone() for t in state]
            self._step()  # compiles kernels; what it writes to the cache, the first replay writes again
            for kept_one, t in zip(kept, state, strict=True):
                t.copy_(kept_one)
        compiled, before = getattr(self.model, "compiled", "none") != "none", self._through_backend()
        self.graph = self._graph(self._step)
        self.lasts = self.model.comm is None or (not compiled and self._through_backend() == before)
        if not compiled:  # else it may be compiled again
            kinds.add(self.kind)

    def _through_backend(self) -> int:
        return 0 if self.model.comm is None else self.model.comm.through_backend

    def _graph(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        there = (graph for graph in (self.graph, *(p.graph for p in self.prompts.values())) if graph is not None)
        pool = next((graph.pool() for graph in there), None)  # graphs run one after the other: they share memory
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.cache.device)
        with _capturing, torch.cuda.stream(side := _side(current)):  # torch.cuda.graph collects garbage each time
            side.wait_stream(current)
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(side)
        return graph

    def _make_angles(self) -> None:
        """Have the angles of the sequences that the cache is for now."""
        rope = self.model.rope
        if rope is None or self.span is self.cache.span or (self.angles is not None and not rope.by_length):
            return
        self.span = self.cache.span
        angles = torch.stack(rope(torch.arange(self.cache.max_len, device=self.cache.device)[None], self.span))
        if self.angles is None:
            self.angles = angles
        else:
            self.angles.copy_(angles)

    def _kind(self) -> Any:
        """What decides which kernels a step is made of."""
        keys, weight, scratch = self.cache.layers[0].k, self.model.embedding.weight, self.cache.scratch
        length = keys.shape[2] if scratch is None else scratch.splits  # our kernel serves all lengths
        angles = None if self.angles is None else self.angles.shape[1]
        shape = keys.shape[:2], length, keys.shape[3], keys.dtype, weight.dtype, weight.device
        # all ranks must see alike whether there is one to be run first: not by addresses
        model = getattr(self.model, "compiled", "none"), *[parameter.shape for parameter in self.model.parameters()]
        device = weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return shape, self.how, self.rows.eos.shape, angles, self.peers is None, model, autocast

    def _step(self) -> None:
        rows, angles = self.rows, None
        if self.angles is not None:
            of_a_row = self.numbers[:, None] if self.angles.shape[1] > 1 else 0
            angles = self.angles[:, of_a_row, rows.lengths].unbind()
        local = self.share is not None
        logits = self.model(rows.fed, cache=self.cache, last_n_tokens=1, angles=angles, local=local)[:, -1]
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.how.repetition_penalty, self.share)
        if self.how.greedy and (self.share is None or self.peers is not None):
            choose_greedily(logits, rows, self.peers, 0 if self.share is None else self.share.first)
        else:
            move_on(*choose(logits, self.how, self.numbers, rows.lengths[:, 0] + 1, self.share), rows)
        if self.seen is not None:
            self.seen.scatter_(1, rows.fed, True)


_kept: WeakKeyDictionary[Any, CapturedStep] = WeakKeyDictionary()


def keep(step: CapturedStep) -> None:
    """Let the model's next generation have a step, if its cache is not too large to lie there until then."""
    layers = step.cache.layers
    if step.lasts and isinstance(step.cache, StaticCache) and len(layers) * 2 * layers[0].k.nbytes <= KEPT:
        _kept[step.model], step.stream = step, _stream(step.cache)
        step.model = None  # or neither would ever be freed


def kept(model: Any, rows: int, length: int, how: Sampling, eos: Collection[int]) -> CapturedStep | None:
    """The step that was kept, its cache empty, if it serves `rows` of at most `length` tokens; else it is forgotten."""
    step = _kept.pop(model, None)
    if step is None or step.cache.batch != rows or step.cache.max_len < length:
        return None
    if step.stream != _stream(step.cache):
        return None  # where it may still run ahead
    step.model = model
    if (step.how, step.eos, step.kind) != (how, sorted(eos), step._kind()):
        return None
    if step.made_of != _made_of(model):
        step.graph = None  # made anew, on this rank maybe alone: of a kind that needs not be run first
        for prompts in step.prompts.values():
            prompts.graph = prompts.logits = None
    step.cache.hold([0] * rows)
    return step


def forget(model: Any) -> None:
    """Give up what the model's last generation has kept."""
    _kept.pop(model, None)


_capturing = Lock()


@cached
def _side(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where what runs on a stream is captured: always the same, as cuBLAS keeps memory for each that it has seen."""
    return torch.cuda.Stream(stream.device)


def _stream(cache: StaticCache | RollingCache) -> Any:
    return torch.cuda.current_stream(cache.device) if cache.device.type == "cuda" else None


def _made_of(model: Any) -> list[int]:
    """Where what a graph of the model reads lies."""
    return [getattr(t, "_local_tensor", t).data_ptr() for t in (*model.parameters(), *model.buffers())]
