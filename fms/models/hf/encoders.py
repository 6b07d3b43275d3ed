"""Encoders with a head as `PreTrainedModel`s: masked language models, classifiers, question answering."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from fms.models.hf.adapter import FMSPreTrainedModel
from fms.modules.encoder_heads import ClassificationHead, MaskedLMHead, SpanHead


class FMSEncoderModel(FMSPreTrainedModel):
    """From transformers' arguments to the head's logits, and the loss of labels where there are any."""

    output: type
    loss: Callable[..., Tensor]  # of logits, labels and what else was given

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' encoders. `attention_mask` (b, s): not 0 where there is a token."""
        x, all_states = self.given(input_ids, inputs_embeds, kwargs)
        arguments = {"mask": attention_mask, "position_ids": position_ids, "token_type_ids": token_type_ids}
        states = None
        if all_states:
            h, states = self.with_states(x, arguments, True)
            logits = self.body.head(h)
        else:
            logits = self.encoder(x, **arguments)
        return self.output(hidden_states=states, **self.fields(logits, labels, kwargs))

    def fields(self, logits: Any, labels: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Loss and logits, under the names of `output`."""
        return {"loss": None if labels is None else self.loss(logits, labels, kwargs), "logits": logits}


class FMSForMaskedLM(FMSEncoderModel):
    """`labels` (b, s) are -100 where nothing was masked."""

    head_class, output = MaskedLMHead, MaskedLMOutput
    out = "head.out"
    _tied_weights_keys = {"encoder.head.out.weight": "encoder.embedding.weight"}  # noqa: RUF012

    def loss(self, logits: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        wanted = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
        return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **wanted)


class FMSForSequenceClassification(FMSEncoderModel):
    """`labels` (b): a class each, numbers if there is one class, or (b, classes) if each is there or not."""

    head_class, output = ClassificationHead, SequenceClassifierOutput

    def loss(self, logits: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)


class FMSForQuestionAnswering(FMSEncoderModel):
    """`start_positions` and `end_positions` (b) are the first and the last token of each answer."""

    head_class, output = SpanHead, QuestionAnsweringModelOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        places = None if start_positions is None else (start_positions, end_positions)
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, places)
        return super().forward(*given, **kwargs)

    def fields(self, logits: Any, labels: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        loss = None if labels is None else self.loss_function(*logits, *labels)
        return {"loss": loss, "start_logits": logits[0], "end_logits": logits[1]}
