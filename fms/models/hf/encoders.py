"""Encoders with a head as `PreTrainedModel`s: masked language models, classifiers, question answering."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput

from fms.models.hf.adapter import FMSPreTrainedModel
from fms.modules.encoder_heads import ClassificationHead, MaskedLMHead, SpanHead


class FMSEncoderModel(FMSPreTrainedModel):
    """From transformers' arguments to the head's logits, and the loss of labels where there are any."""

    output: type

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' encoders. `attention_mask` (b, s): not 0 where there is a token."""
        x = self.given(input_ids, inputs_embeds, kwargs)
        arguments = {"mask": attention_mask, "position_ids": position_ids, "token_type_ids": token_type_ids}
        states = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            h, states = self.with_states(x, arguments, True)
            logits = self.body.head(h)
        else:
            logits = self.encoder(x, **arguments)
        fields = self.fields(logits, labels, kwargs)
        out = self.output(hidden_states=states, **fields)
        return out if return_dict is not False else out.to_tuple()

    def fields(self, logits: Any, labels: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Loss and logits, under the names of `output`."""
        loss = None if labels is None else self.loss(logits, labels, kwargs)
        return {"loss": loss, "logits": logits}

    def loss(self, logits: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class FMSForMaskedLM(FMSEncoderModel):
    """`labels` (b, s) are -100 where nothing was masked."""

    head_class, output = MaskedLMHead, MaskedLMOutput
    _tied_weights_keys = {"encoder.head.out.weight": "encoder.embedding.weight"}  # noqa: RUF012

    def get_output_embeddings(self) -> nn.Module:
        return self.body.head.out

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        out = self.body.head.out
        out.weight, out.bias, out.out_features = new_embeddings.weight, new_embeddings.bias, len(new_embeddings.weight)

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

    def forward(self, *args: Any, start_positions: Any = None, end_positions: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, start_positions=start_positions, end_positions=end_positions, **kwargs)

    def fields(self, logits: Any, labels: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        start, end = logits
        places = kwargs["start_positions"], kwargs["end_positions"]
        loss = None if None in places else self.loss_function(start, end, *places)
        return {"loss": loss, "start_logits": start, "end_logits": end}
