"""What all adapters share: a model here as a `PreTrainedModel`, and a causal one that generates."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from fms.models.decoder import Decoder
from fms.models.freeze import is_frozen
from fms.models.hf.cache import Past, causal_mask, check_cache, underneath
from fms.models.hf.config import FMSConfig
from fms.modules.frozen import Frozen
from fms.modules.initial import reset_parameters

FROZEN = "this model is frozen: it computes with fused weights, which tuning would not reach; tune before freeze(model)"


class FMSPreTrainedModel(PreTrainedModel):
    """A model under the attribute `part`; its parameters keep their names behind that."""

    config: FMSConfig
    encoder: Any
    config_class = FMSConfig
    part = "encoder"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Block", "FrozenBlock", "EncoderBlock", "FrozenEncoderBlock"]  # noqa: RUF012
    head_class: type | None = None
    out: str | None = None  # where in the model the weights of logits of the vocabulary are

    def __init__(self, config: FMSConfig, model: Any = None):
        super().__init__(config)
        made = config.build() if model is None else model
        self.check(made)
        setattr(self, self.part, made)
        if model is not None:  # has its weights: transformers must not draw others
            for module in self.modules():
                vars(module)["_is_hf_initialized"] = True
        self.post_init()

    def check(self, model: Any) -> None:
        """Raise `ValueError` for a model that does not do what this class is for."""
        head = getattr(model, "head", None)
        if self.head_class is not None and not isinstance(head, self.head_class):
            has = "none" if head is None else f"a {type(head).__name__}"
            needs = f"{type(self).__name__} needs a {self.head_class.__name__}"
            raise ValueError(f"{needs}, and {self.config.architecture} has {has}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_config" and is_frozen(self):
            raise ValueError(FROZEN)
        inner = getattr(value, "_orig_mod", value)
        super().__setattr__(name, inner)
        if inner is not value:  # torch.compile's wrapper is what is called, the model keeps its parameters' names
            self.__dict__[name] = value

    def train(self, mode: bool = True) -> "FMSPreTrainedModel":
        if mode and is_frozen(self):
            raise ValueError(FROZEN)
        return super().train(mode)

    @property
    def body(self) -> Any:
        """The model itself, whether calls to it are compiled or not."""
        return self._modules[self.part]

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.body.embedding = value

    def get_output_embeddings(self) -> Any:
        return self.body.get_submodule(self.out) if self.out else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        for name, parameter in new_embeddings.named_parameters():
            setattr(self.get_output_embeddings(), name, parameter)
        self.get_output_embeddings().out_features = new_embeddings.out_features

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.body.config = self.body.config.updated(src_vocab_size=embedding.num_embeddings)
        return embedding

    def _init_weights(self, module: nn.Module) -> None:
        reset_parameters(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        self.gradient_checkpointing = enable
        for i, block in enumerate(self.body.layers):
            vars(block).pop("forward", None)
            if enable and i % every_n_layers == 0:
                block.forward = recomputed(block, block.forward, gradient_checkpointing_func)

    def given(self, input_ids: Any, inputs_embeds: Any, wanted: dict[str, Any]) -> tuple[Tensor, bool]:
        """The one input that there is, and whether all hidden states are wanted. Raises `ValueError` for both or none,
        and for what no adapter can give."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{'neither' if input_ids is None else 'both'} of input_ids and inputs_embeds: give one")
        if wanted.get("output_attentions"):
            raise ValueError("output_attentions=True: attention weights are never computed here, only what they weigh")
        if input_ids is not None and not torch.compiler.is_compiling():
            unseen = input_ids.is_cuda and (self.training or input_ids.shape[1] == 1)  # where looking would wait
            size = self.body.config.src_vocab_size
            if not unseen and (largest := int(input_ids.max())) >= size:
                raise ValueError(f"token id {largest} lies beyond the vocabulary of {size}: is it another's tokenizer?")
        states = wanted.get("output_hidden_states")
        states = self.config.output_hidden_states if states is None else states
        return input_ids if inputs_embeds is None else inputs_embeds, bool(states)

    def with_states(self, x: Tensor, arguments: dict[str, Any], all_states: bool) -> tuple[Tensor, Any]:
        """The last hidden state and, if wanted, what each block was given and the last one, as transformers has it."""
        if not all_states:
            return self.body.hidden(x, **arguments), None
        states: list[Tensor] = []
        hooks = [b.register_forward_pre_hook(lambda _, args: states.append(args[0])) for b in self.body.layers]
        try:
            last = self.body.hidden(x, **arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return last, (*states, last)


def recomputed(block: nn.Module, forward: Callable, run: Callable) -> Callable:
    """`forward` that a backward pass computes again instead of keeping what it needs."""
    return lambda *args: run(forward, *args) if block.training and torch.is_grad_enabled() else forward(*args)


class FMSDecoderModel(FMSPreTrainedModel):
    """The causal part of what follows: positions, mask and cache from transformers' arguments."""

    part = "decoder"

    def check(self, model: Any) -> None:
        if not isinstance(model, Decoder):
            raise ValueError(f"{type(self).__name__} needs a causal model, and {self.config.architecture} is not one")

    def prepared(self, x: Tensor, attention_mask: Any, position_ids: Any, cache: Any, use_cache: Any) -> tuple:
        """The decoder's arguments and the cache, a new one where one is wanted."""
        (rows, s), n = x.shape[:2], len(self.body.layers)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        seen: Any = 0
        ours = None
        if cache is not None:
            check_cache(cache, n, rows, s)
            ours = underneath(cache, self.body, rows, s)
            seen = cache.get_seq_length()
        padded = attention_mask is not None and attention_mask.dim() == 2
        if not isinstance(seen, Tensor) and seen + s > self.body.config.max_positions:
            self.body._check_length(int(attention_mask.sum(1).max()) if padded else seen + s)
        like = self.body.embedding.weight.new_empty(rows, s, 0)
        mask = causal_mask(self.config, like, attention_mask, cache, position_ids)
        if position_ids is None and padded and attention_mask.shape[1] >= s:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -s:]
        elif position_ids is None:
            position_ids = (torch.arange(s, device=x.device) + seen)[None]
        scaling = self.body.rope.scaling if self.body.rope else None
        span = position_ids.max() + 1 if scaling and scaling.kind == "dynamic" else None  # as transformers has it
        past = None if cache is None else Past(cache, ours, n, position_ids, span)
        return {"position_ids": position_ids, "mask": mask, "cache": past}, cache


class FMSForCausalLM(FMSDecoderModel, GenerationMixin):
    """`hf(input_ids).logits`, `hf.generate(...)`. `hf.decoder` is the model; its compiled self may take its place."""

    decoder: Any
    out = "head"
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}  # noqa: RUF012

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose arguments `generate` looks at
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As ever, less a mask that hides nothing: looked at once, since looking waits for the device at every token,
        and generation itself adds only ones."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if type(cache) is DynamicCache and mask is not None and mask.dim() == 2:
            if kwargs.get("is_first_iteration") or "unpadded" not in vars(cache):
                vars(cache)["unpadded"] = bool(mask.all())
            kwargs["attention_mask"] = None if vars(cache)["unpadded"] else mask
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As transformers' causal models. `logits_to_keep`: logits of the last so many tokens (0: all), or of those
        that a tensor names. `labels` (b, s) are the inputs, -100 where a token is not to be learnt."""
        x, all_states = self.given(input_ids, inputs_embeds, kwargs)
        arguments, cache = self.prepared(x, attention_mask, position_ids, past_key_values, use_cache)
        states = None
        if all_states or isinstance(logits_to_keep, Tensor):
            h, states = self.with_states(x, arguments, all_states)
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            logits = self.body.head(h[:, kept])
        else:
            past = arguments["cache"] if arguments["mask"] is None and x.shape[1] == 1 else None
            # kernels that are launched by hand would only wait longer in compiled code
            by_hand = past and past.ours and past.ours.scratch and isinstance(self.body.layers[0], Frozen)
            logits = (self.body if by_hand else self.decoder)(x, **arguments, last_n_tokens=logits_to_keep)
        loss = None
        if labels is not None:
            wanted = {k: v for k, v in kwargs.items() if k in ("num_items_in_batch", "shift_labels", "ignore_index")}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **wanted)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)


class FMSModel(FMSDecoderModel):
    """The hidden states of any model, as transformers' models without a head give them."""

    def check(self, model: Any) -> None:
        self.part = "decoder" if model.causal else "encoder"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        x, all_states = self.given(input_ids, inputs_embeds, kwargs)
        cache, types = kwargs.get("past_key_values"), kwargs.get("token_type_ids")
        if self.body.causal:
            arguments, cache = self.prepared(x, attention_mask, position_ids, cache, kwargs.get("use_cache"))
        else:
            arguments = {"mask": attention_mask, "position_ids": position_ids, "token_type_ids": types}
        last, states = self.with_states(x, arguments, all_states)
        return BaseModelOutputWithPast(last, cache, states)
