"""RoBERTa and BERT with each head against transformers: results, gradients, dropout, masks, compiling; their names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms.models import freeze, get_model
from fms.models.freeze import is_frozen
from fms.models.registry import build
from fms.utils.serialization.checkpoint import open_checkpoint
from tests.encoders import CASES, EIGHT, HEADS, LENGTH, MLM, close, flat, inputs, pair, reference

frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])


@frozen_or_not
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_as_transformers(case: str, frozen: bool, tmp_path: Path) -> None:
    theirs, ours = pair(case, frozen, tmp_path)
    family, head, _ = CASES[case]
    assert ours.architecture == family.lower() + HEADS[head]
    assert is_frozen(ours) == frozen
    ids, mask, types = inputs(ours)
    want = flat(theirs(ids, attention_mask=mask, token_type_ids=types))
    assert 0.3 < want.std() < 6
    for one in (mask, mask.bool(), mask.bool()[:, None].expand(-1, LENGTH, -1), mask.bool()[:, None, None]):
        close(flat(ours(ids, mask=one, token_type_ids=types)), want)
    close(flat(ours(ids)), flat(theirs(ids)))
    one = torch.randint(24, (1, LENGTH))
    close(flat(ours(ids, position_ids=one)), flat(theirs(ids, position_ids=one)))
    embedded = theirs.get_input_embeddings()(ids)
    close(flat(ours(embedded, mask=mask)), flat(theirs(inputs_embeds=embedded, attention_mask=mask)))
    states = theirs.base_model(ids, attention_mask=mask)
    close(ours.hidden(ids, mask=mask), states.last_hidden_state)
    if ours.pooler is not None:
        close(ours.pooler(ours.hidden(ids, mask=mask)), states.pooler_output)


@frozen_or_not
@torch.no_grad()
def test_a_float_mask_and_one_token(frozen: bool, tmp_path: Path) -> None:
    theirs, ours = pair("BertForMaskedLM", frozen, tmp_path)
    ids, _, _ = inputs(ours, rows=2)
    allowed = (torch.rand(2, 4, LENGTH, LENGTH) < 0.6) | torch.eye(LENGTH, dtype=torch.bool)
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    want = theirs(ids, attention_mask=added).logits
    close(ours(ids, mask=added), want)
    close(ours(ids, mask=allowed), want)
    close(ours(ids[:, :1]), theirs(ids[:, :1]).logits)


@pytest.mark.parametrize("case", EIGHT)
def test_gradients(case: str, tmp_path: Path) -> None:
    """Of masked-LM cross-entropy at a few places for that head, of a sum of squares for the others."""
    theirs, ours = pair(case, False, tmp_path)
    ids, mask, types = inputs(ours)
    labels = ids.masked_fill((torch.rand(ids.shape) > 0.3) | (mask == 0), -100)
    for model, name in ((theirs, "attention_mask"), (ours, "mask")):
        output = flat(model(ids, token_type_ids=types, **{name: mask}))
        if case.endswith(MLM):
            F.cross_entropy(output.flatten(0, 1), labels.flatten()).backward()
        else:
            output.pow(2).sum().backward()
    want = dict(theirs.named_parameters())
    parts, _ = open_checkpoint(tmp_path).parts(ours.config)
    for name, parameter in ours.named_parameters():
        gradient = want[parts[name].key].grad
        if name.endswith("key.bias") or name.startswith("pooler"):  # nothing comes of either
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-3
            continue
        error = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name}: {error}"


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Where dropout acts: its probability and the shape, of attention weights too; nothing is dropped."""
    calls: list = []
    attention = F.scaled_dot_product_attention

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and p:
            calls.append((p, tuple(x.shape)))
        return x

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout: float = 0.0, **more: Any) -> Tensor:
        if dropout:
            calls.append((dropout, (*q.shape[:3], k.shape[2])))
        return attention(q, k, v, mask, 0.0, **more)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return calls


@pytest.mark.parametrize("case", [*EIGHT, "roberta, five classes"])
def test_dropout_acts_where_theirs_does(case: str, dropped: list, tmp_path: Path) -> None:
    theirs = reference(case, tmp_path, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.15)
    ours = get_model(model_path=tmp_path)
    ids, _, _ = inputs(ours)
    theirs.train()(ids)
    want = list(dropped)
    assert len(want) >= 1 + 3 * 2
    dropped.clear()
    ours.train()(ids)
    assert dropped == want
    dropped.clear()
    ours.eval()(ids)
    freeze(get_model(model_path=tmp_path))(ids)
    assert not dropped


@frozen_or_not
@pytest.mark.parametrize("case", ["BertForMaskedLM", "RobertaForSequenceClassification", "RobertaForQuestionAnswering"])
@torch.no_grad()
def test_compiles_into_one_graph(case: str, frozen: bool, tmp_path: Path) -> None:
    _, ours = pair(case, frozen, tmp_path)
    ids, mask, types = inputs(ours)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    close(flat(compiled(ids, mask=mask, token_type_ids=types)), flat(ours(ids, mask=mask, token_type_ids=types)))
    close(flat(compiled(ids)), flat(ours(ids)))


BODY = """\
embedding.weight
position_embedding.weight
token_type_embedding.weight
enc_norm.weight enc_norm.bias
layers.0.attn.query.weight layers.0.attn.query.bias
layers.0.attn.key.weight layers.0.attn.key.bias
layers.0.attn.value.weight layers.0.attn.value.bias
layers.0.attn.dense.weight layers.0.attn.dense.bias
layers.0.ln.weight layers.0.ln.bias
layers.0.ff.w1.weight layers.0.ff.w1.bias
layers.0.ff.w2.weight layers.0.ff.w2.bias
layers.0.ff_ln.weight layers.0.ff_ln.bias
"""
TOPS = {
    "": "head.dense.weight head.dense.bias head.ln.weight head.ln.bias head.out.weight head.out.bias",
    "_classification": "head.dense.weight head.dense.bias head.out.weight head.out.bias",
    "_question_answering": "head.out.weight head.out.bias",
    "_embedding": "pooler.weight pooler.bias",
}


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("task", TOPS)
def test_names_of_parameters(family: str, task: str) -> None:
    model = get_model(family + task, "base", nlayers=1, emb_dim=8, nheads=2, hidden_dim=8, src_vocab_size=9)
    assert sorted(model.state_dict()) == sorted((BODY + TOPS[task]).split())
    before = sorted(model.state_dict())
    assert sorted(freeze(model).state_dict()) == before


@pytest.mark.parametrize(("architecture", "parameters"), [("roberta", 124_697_433), ("bert", 109_514_298)])
def test_sizes_of_base_models(architecture: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build(architecture, "base", {})
    assert sum(p.numel() for p in model.parameters()) == parameters


@torch.no_grad()
def test_roberta_counts_real_tokens_wherever_the_padding_is(tmp_path: Path) -> None:
    theirs, ours = pair("RobertaForMaskedLM", False, tmp_path)
    ids, mask, _ = inputs(ours)
    ids, mask = ids.flip(1), mask.flip(1)
    close(ours(ids, mask=mask), theirs(ids, attention_mask=mask).logits)
    real = ours(ids, mask=mask)[2, -8:]
    close(real, ours(ids[2:, -8:])[0])


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("bert", {"nheads": 5}, r"emb_dim=768 must be a multiple of nheads=5"),
        ("bert", {"type_vocab_size": 0}, r"type_vocab_size=0 must be a whole number"),
        ("bert", {"attn_dropout": 1.0}, r"attn_dropout=1.0 must lie in \[0, 1\)"),
        ("roberta", {"pad_id": None}, r"pad_id=None, and position_after_pad needs one"),
        ("roberta", {"pad_id": 50_265}, r"pad_id=50265 must lie in the vocabulary of 50265"),
        ("roberta", {"type_vocab": 2}, r"no field 'type_vocab' \(did you mean 'type_vocab_size'\?\)"),
        ("bert_classification", {"labels": ("a",)}, r"labels names 1 classes, num_classes=2"),
        ("bert_classification", {"num_classes": 0}, r"num_classes=0 must be at least 1"),
    ],
)
def test_what_cannot_be_built(architecture: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_model(architecture, "base", **fields)


def test_too_many_tokens() -> None:
    model = get_model("roberta", "micro", nlayers=1, max_expected_seq_len=6)
    model(torch.full((1, 6), 3))
    with pytest.raises(ValueError, match=r"7 tokens are more than the max_expected_seq_len=6"):
        model(torch.full((1, 7), 3))
