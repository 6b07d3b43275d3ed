"""A transformers cache with the contract of fms/modules/cache.py, and the mask that goes with it."""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


class Layer:
    def __init__(self, cache: Cache, index: int):
        self.cache, self.index = cache, index

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(k, v, self.index)


class Past:
    """What a decoder takes as `cache=`. `positions` are those of the next pass; `span` as of every cache."""

    def __init__(self, cache: Cache, nlayers: int, positions: Tensor, span: int | None):
        self.layers = [Layer(cache, i) for i in range(nlayers)]
        self.positions, self.span = positions, span

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        return self.positions, None


def check_cache(cache: Any, nlayers: int, rows: int, new: int) -> None:
    """Raise `ValueError` if a cache is not one for `new` more tokens of `rows` rows of such a model."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, a transformers Cache is required: DynamicCache()"
        )
    if cache.layers and len(cache.layers) != nlayers:
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model {nlayers}: make one of its own config")
    layer: Any
    for layer in cache.layers[:1]:
        held = layer.keys.shape[0] if layer.is_initialized and layer.get_seq_length() else rows
        if held != rows:
            raise ValueError(f"the cache holds {held} rows, the input has {rows}: start a new cache")
        room, seen = layer.get_max_length(), layer.get_seq_length()
        if layer.is_compileable and not layer.is_sliding and seen + new > room:
            raise ValueError(
                f"{int(seen)} tokens in the cache and {new} new ones are more than its max_cache_len={room}"
            )


def causal_mask(config: Any, embeds: Tensor, given: Tensor | None, cache: Cache | None, positions: Any) -> Any:
    """True where a query may look, (b, 1, s, kv), or `None` where plain causal attention says it already."""
    make = create_causal_mask if config.window is None else create_sliding_window_causal_mask
    return make(
        config=config, inputs_embeds=embeds, attention_mask=given, past_key_values=cache, position_ids=positions
    )
