"""transformers' caches with the contract of fms/modules/cache.py, ours underneath where it pays, and the masks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from fms.modules.cache import StaticCache


@dataclass
class Layer:
    cache: Cache
    index: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(k, v, self.index)


class Past:
    """What a decoder takes as `cache=`. `positions` are those of the next pass; `span` as of every cache."""

    def __init__(self, cache: Cache, ours: StaticCache | None, nlayers: int, positions: Tensor, span: Any):
        self.layers: Any = [Layer(cache, i) for i in range(nlayers)] if ours is None else ours.layers
        self.ours, self.positions, self.span = ours, positions, span

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        if self.ours is not None:
            self.ours.advance(n)
        return self.positions, None


def held(name: str) -> Any:
    """The tokens in our layer's buffer `name`, until transformers puts others in their place."""

    def read(layer: "KeptLayer") -> Tensor:
        return layer.others.get(name, getattr(layer.at, name)[:, :, : layer.ours.length])

    return property(read, lambda layer, tokens: layer.others.update({name: tokens}))


class KeptLayer(DynamicLayer):
    """A layer of a `DynamicCache` whose tokens lie in one of our layers: new ones are written there, none are moved."""

    keys, values = held("k"), held("v")

    def __init__(self, ours: StaticCache, index: int):
        self.ours, self.at, self.others = ours, ours.layers[index], dict[str, Tensor]()
        self.dtype, self.device, self.is_initialized = self.at.k.dtype, self.at.k.device, True


def underneath(cache: Any, model: Any, rows: int, new: int) -> StaticCache | None:
    """Our cache that keeps the tokens of `cache`, with room for `new` more of each row; `None` if it can't be that."""
    mixed = torch.is_grad_enabled() or torch.is_autocast_enabled(model.embedding.weight.device.type)
    if mixed or type(cache) is not DynamicCache or cache.offloading or model.window is not None:
        return None
    if torch.compiler.is_compiling() or any(type(layer) not in (DynamicLayer, KeptLayer) for layer in cache.layers):
        return None
    layer: Any
    seen = cache.get_seq_length()
    size = seen + new
    ours: Any = getattr(cache.layers[0], "ours", None) if seen else None
    if ours is None or ours.batch != rows or ours.max_len < size:
        size += -size % max(1 << size.bit_length() >> 3, 64)  # to spare, so that there are few sizes on the way
        longest = min(size, model.config.max_positions)
        with torch.inference_mode(False):  # where what was made could not be written to elsewhere
            ours = model.make_cache(rows, longest, slack=size - longest)
        old: Any = cache.layers if seen else ()
        cache.layers = [KeptLayer(ours, i) for i in range(len(ours.layers))]
        for layer, other in zip(cache.layers, old, strict=False):
            layer.keys, layer.values = other.keys, other.values
    for layer in cache.layers:
        for name, tokens in layer.others.items():
            if tokens.data_ptr() != (buffer := getattr(layer.at, name)).data_ptr():  # else it is what a crop left
                buffer[:, :, :seen] = tokens
        layer.others.clear()
    ours.length = seen
    return ours


def check_cache(cache: Any, nlayers: int, rows: int, new: int) -> None:
    """Raise `ValueError` if a cache is not one for `new` more tokens of `rows` rows of such a model."""
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}, a transformers Cache is required")
    if not cache.layers:
        return
    if len(cache.layers) != nlayers:
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model {nlayers}: make one of its own config")
    layer: Any = cache.layers[0]
    static, seen, room = layer.is_compileable, layer.get_seq_length(), layer.get_max_length()
    there = layer.keys.shape[0] if layer.is_initialized and (static or seen) else rows
    if there != rows:
        raise ValueError(f"the cache holds {there} rows, the input has {rows}: start a new cache")
    unseen = isinstance(seen, Tensor) and seen.is_cuda and new == 1  # where looking would wait, at every token
    if static and not layer.is_sliding and not unseen and not torch.compiler.is_compiling() and seen + new > room:
        raise ValueError(f"{int(seen)} tokens in the cache and {new} new ones are more than its max_cache_len={room}")


def causal_mask(config: Any, embeds: Tensor, given: Tensor | None, cache: Cache | None, positions: Any) -> Any:
    """True where a query may look, (b, 1, s, kv), or `None` where plain causal attention says it already."""
    whole = config.sliding_window is None
    if given is None and embeds.shape[1] == 1 and whole and not (cache and cache.is_compileable):
        return None
    make = create_causal_mask if whole else create_sliding_window_causal_mask
    how = {"attention_mask": given, "past_key_values": cache, "position_ids": positions}
    return make(config=config, inputs_embeds=embeds, **how)
