"""Objectives against transformers', on the same weights; how tokens are masked; that a model learns by them."""

from pathlib import Path

import pytest
import torch

from fms.models import get_model
from fms.training.loss import IGNORED, causal_loss, mask_tokens, masked_lm_loss

transformers = pytest.importorskip("transformers")

BERT = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SPECIAL = {0, 1, 2}


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_masked_words_as_transformers(family: str, tmp_path: Path) -> None:
    theirs = getattr(transformers, f"{family}ForMaskedLM")(getattr(transformers, f"{family}Config")(**BERT)).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.15)
    theirs.save_pretrained(tmp_path)
    ours = get_model(model_path=tmp_path).train()
    ids = torch.randint(3, 67, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    shown, labels = mask_tokens(ids, 2, 67, SPECIAL, rate=0.4)
    want = theirs(shown, attention_mask=mask, labels=labels).loss
    got = masked_lm_loss(ours, shown, labels, mask)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    want.backward()
    got.backward()
    gradient = (theirs.bert if family == "Bert" else theirs.roberta).encoder.layer[0].attention.self.query.weight.grad
    torch.testing.assert_close(ours.layers[0].attn.query.weight.grad, gradient, atol=1e-5, rtol=1e-4)


def test_the_next_token_as_transformers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(67, (2, 9))
    labels = ids.clone()
    labels[:, :4] = IGNORED
    ours = get_model(model_path=tmp_path)
    for asked in (ids, labels):
        torch.testing.assert_close(causal_loss(ours, ids, asked), theirs(ids, labels=asked).loss, atol=1e-6, rtol=1e-6)


def test_how_tokens_are_masked() -> None:
    ids = torch.randint(0, 1000, (200, 500), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    shown, labels = mask_tokens(ids, 999, 1000, SPECIAL, generator=generator)
    found = labels != IGNORED
    assert not (found & torch.isin(ids, torch.tensor(sorted(SPECIAL)))).any()
    assert torch.equal(labels[found], ids[found])
    assert torch.equal(shown[~found], ids[~found])
    assert found.float().mean() == pytest.approx(0.15 * 0.997, abs=0.005)
    assert (shown[found] == 999).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (shown[found] == ids[found]).float().mean() == pytest.approx(0.1, abs=0.01)
    again = mask_tokens(ids, 999, 1000, SPECIAL, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], shown)
    assert torch.equal(again[1], labels)


def test_nothing_to_find_is_no_loss() -> None:
    model = get_model("roberta", "micro", nlayers=1)
    ids = torch.randint(3, 200, (1, 5))
    assert masked_lm_loss(model, ids, torch.full_like(ids, IGNORED)) == 0


def test_rate_outside_its_range() -> None:
    with pytest.raises(ValueError, match=r"rate=0 must lie in \(0, 1\]"):
        mask_tokens(torch.zeros(1, 2, dtype=torch.long), 1, 9, rate=0)


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
def test_ten_steps_learn_a_sentence(architecture: str) -> None:
    dropouts = {"p_dropout": 0.0, "attn_dropout": 0.0} if architecture == "roberta" else {}
    model = get_model(architecture, "micro", nlayers=1, **dropouts).train()
    ids = torch.randint(3, 200, (2, 16))
    shown, labels = mask_tokens(ids, 2, 256, rate=0.5, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = causal_loss(model, ids) if architecture == "llama" else masked_lm_loss(model, shown, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
