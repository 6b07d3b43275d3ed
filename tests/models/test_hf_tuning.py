"""`Trainer` and PEFT on adapted models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fms.models import freeze, get_model

transformers = pytest.importorskip("transformers")

from fms.models.hf import FMSForCausalLM, to_hf_api  # noqa: E402
from tests import encoders  # noqa: E402
from tests.models.test_against_transformers import close, pair  # noqa: E402
from tests.small import small_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # its own use
TARGETS = ["query", "key", "value", "dense", "w1", "w2", "wg"]
ids = torch.randint(24, (8, 12), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": row, "labels": row} for row in ids]


def arguments(path: Path, **more: Any) -> Any:
    return transformers.TrainingArguments(
        str(path),
        **{
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "data_seed": 0,
        }
        | more,
    )


def losses(model: Any, path: Path, **more: Any) -> list[float]:
    transformers.set_seed(0)
    trainer = transformers.Trainer(model, arguments(path, **more), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(path / "trained"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
def test_trainer_takes_the_steps_that_it_takes_with_transformers_model(more: dict, tmp_path: Path) -> None:
    theirs, ours = pair("gqa", False, tmp_path / "model")
    want, got = (losses(model, tmp_path / name, **more) for model, name in ((theirs, "a"), (to_hf_api(ours), "b")))
    assert len(got) == 10
    assert got[-1] < got[0] - 0.5
    close(torch.tensor(got), torch.tensor(want))
    again = FMSForCausalLM.from_pretrained(tmp_path / "b" / "trained")
    close(again(ids).logits, ours(ids))


@pytest.mark.parametrize("case", ["BertForMaskedLM", "RobertaForSequenceClassification", "BertForQuestionAnswering"])
def test_trainer_of_encoders_and_a_dataset(case: str, tmp_path: Path) -> None:
    """Of a dataset the Trainer keeps only the columns that `forward` names."""
    datasets = pytest.importorskip("datasets")
    inputs = ids + 8  # beyond the ids of special tokens
    labels: dict[str, Any] = {"labels": inputs if "Masked" in case else torch.arange(8) % 2}
    if "Answering" in case:
        labels = {"start_positions": torch.arange(8), "end_positions": torch.arange(8) + 3}
    data = datasets.Dataset.from_dict({name: x.tolist() for name, x in ({"input_ids": inputs} | labels).items()})
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    theirs = encoders.reference(case, tmp_path / "model", **none)
    found = []
    for model in (theirs, to_hf_api(get_model(model_path=tmp_path / "model"))):
        transformers.set_seed(0)
        trainer = transformers.Trainer(
            model, arguments(tmp_path, max_steps=3, save_strategy="no"), train_dataset=data, eval_dataset=data
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        found.append([before, trainer.evaluate()["eval_loss"]])
    assert found[1][1] < found[1][0] - 0.1
    close(*map(torch.tensor, found))


def test_trainer_with_recomputed_activations(tmp_path: Path) -> None:
    plain, checkpointed = (
        losses(to_hf_api(small_model()), tmp_path, gradient_checkpointing=on) for on in (False, True)
    )
    assert plain == pytest.approx(checkpointed, abs=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_lora(compiled: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    hf = to_hf_api(small_model())
    before = {name: p.clone() for name, p in hf.named_parameters()}
    if compiled:
        hf.decoder = torch.compile(hf.decoder, backend="eager")
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(hf, config)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(TARGETS) * len(hf.decoder.layers)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(3):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0]
    tuned.eval()
    want = tuned(input_ids=ids).logits.detach()

    tuned.save_pretrained(tmp_path)
    fresh = to_hf_api(small_model())
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, before[name])
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    close(again(input_ids=ids).logits, want)
    assert torch.equal(
        again.generate(input_ids=ids[:1], max_new_tokens=5), tuned.generate(input_ids=ids[:1], max_new_tokens=5)
    )
    merged = again.merge_and_unload()
    assert type(merged) is FMSForCausalLM
    close(merged(ids).logits, want)
    close(freeze(merged.decoder)(ids), want)


def test_lora_of_a_frozen_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    hf = to_hf_api(freeze(small_model()))
    with pytest.raises(ValueError, match="this model is frozen"):
        peft.get_peft_model(hf, peft.LoraConfig(r=4, target_modules=["query"]))


def test_a_frozen_model_is_not_trained() -> None:
    hf = to_hf_api(freeze(small_model()))
    with pytest.raises(ValueError, match="this model is frozen"):
        hf.train()
    assert not hf.eval().training
