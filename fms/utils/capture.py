"""The decode step as a CUDA graph: from the last token of each row to the next, without the host."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fms.modules.cache import StaticCache
from fms.utils.sampling import Sampling, choose


class CapturedStep:
    """Feeds each row's last token to the model and chooses the next. All it needs lies, and is moved on, on the device.

    `begin`, then `replay` for each token, then `finish`. A row that ends, at a token of `eos` or when it is full, feeds
    no more: what it is given from there on is not its own, and its length in the cache stays.
    """

    def __init__(self, model: Any, cache: StaticCache, how: Sampling | None = None, eos: Collection[int] = ()):
        if how is not None and how.repetition_penalty != 1:
            raise ValueError("a repetition penalty is not part of the captured step")
        b, device = cache.batch, cache.device
        self.model, self.cache, self.how = model, cache, how or Sampling()
        self.eos = torch.tensor(sorted(eos), dtype=torch.long, device=device)
        self.rows = torch.arange(b, device=device)
        self.lengths, self.ends, self.going, self.fed = torch.zeros(4, b, 1, dtype=torch.long, device=device).unbind()
        self.tokens = torch.zeros(b, dtype=torch.long, device=device)  # the newest; -1 where logits were not finite
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, tokens: Tensor, ends: Sequence[int] | Tensor) -> None:
        """Go on behind what the cache holds with each row's last `tokens` (b); a row has at most ends[row] tokens."""
        held = torch.tensor(self.cache.held())[:, None]
        self.lengths.copy_(held)
        self.ends.copy_(torch.as_tensor(ends).view(-1, 1))
        self.fed.copy_(tokens.view(-1, 1))
        self.cache.lengths, self.cache.steady = self.lengths, True
        self.going.fill_(1)
        self._end()
        if self.graph is None:
            self._capture()

    def replay(self) -> None:
        """Choose one more token a row: `tokens` once the device has come so far."""
        assert self.graph is not None
        self.graph.replay()

    def finish(self, lengths: Sequence[int]) -> None:
        """Leave the cache to others, its rows holding these numbers of tokens."""
        self.cache.hold(lengths)

    def _capture(self) -> None:
        kept = [t.clone() for t in (self.lengths, self.going, self.fed)]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.cache.device)
        self._step()  # compiles kernels; what it writes to the cache, the first replay writes again
        for kept_one, t in zip(kept, (self.lengths, self.going, self.fed), strict=True):
            t.copy_(kept_one)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # not torch.cuda.graph: that empties the allocator's store and collects garbage
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph

    def _step(self) -> None:
        logits = self.model(self.fed, cache=self.cache, last_n_tokens=1)[:, -1]
        tokens, fit = choose(logits, self.how, self.rows, self.lengths[:, 0] + 1)
        self.tokens.copy_(torch.where(fit, tokens, -1))
        self.fed.copy_(tokens[:, None])
        self.lengths.add_(self.going)
        self._end()

    def _end(self) -> None:
        """Stop rows whose last token, not fed yet, is their end."""
        last = (self.fed == self.eos).any(-1, keepdim=True) | (self.lengths + 1 >= self.ends)
        self.going.masked_fill_(last, 0)
