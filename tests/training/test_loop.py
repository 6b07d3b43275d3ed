"""A run: the same wherever it is interrupted, and what it does when something goes wrong."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fms.models import get_model
from fms.training import checkpoint
from fms.training.checkpoint import Checkpoints
from fms.training.config import TrainConfig, read_settings
from fms.training.loop import NonFiniteError
from fms.training.lora import add_lora
from fms.training.metrics import flops_per_token, read_rows
from fms.training.objective import LMLoss, Masking
from fms.training.optim import make_optimizer, make_schedule
from fms.utils.serialization.errors import CheckpointError
from tests.training.runs import SHAPE, Data, settings, small_model, trainer

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "llama": ("micro", {}),
    "granite": ("8b", {}),
    "mistral": ("7b", {}),
    "qwen3": ("0.6b", {}),
    "gpt_bigcode": ("micro", {"kvheads": 1}),
    "mixtral": ("8x7b", {"num_experts": 4, "top_k_experts": 2}),
    "granite_moe_hybrid": ("8b", {"num_experts": 4, "top_k_experts": 2, "expert_dim": 32}),
}


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_rows(output) if "loss" in row]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str, tmp_path: Path) -> None:
    variant, fields = FAMILIES[family]
    assert trainer(settings(tmp_path, steps=10), small_model(family, variant, **fields)).run() == 0
    found = losses(tmp_path)
    assert len(found) == 10
    assert sum(found[-2:]) < sum(found[:2])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encoders_learn_masked_words(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_model(family, None, **(SHAPE | {"pad_id": 1}))
    config = settings(tmp_path, steps=10, objective="masked", architecture=family)
    trainer(config, model, prepare=Masking(4, 61, {1})).run()
    found = losses(tmp_path)
    assert sum(found[-3:]) < sum(found[:3])
    with pytest.raises(ValueError, match="learns by 'masked'"):
        LMLoss(model, "causal")


def test_documents_that_share_a_row_are_apart() -> None:
    root, ids = LMLoss(small_model()), torch.randint(61, (2, 12))
    labels = ids.clone()
    labels[:, 5] = -100
    place = torch.cat((torch.arange(5), torch.arange(7))).expand(2, 12)
    documents = (torch.arange(12) >= 5).long().expand(2, 12)
    together = root({"input_ids": ids, "labels": labels, "position_ids": place, "document_ids": documents})
    parts = [{"input_ids": part, "labels": part} for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(together, root(parts[0]) + root(parts[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_bf16_above_fp32(mode: str, tmp_path: Path) -> None:
    from fms.training.parallel import recompute

    trainer(settings(tmp_path / "wide", steps=6), small_model(tie_heads=True)).run()
    model = small_model(tie_heads=True)
    recompute(model, mode)
    before, seen = dict(model.named_parameters()), []
    model.layers[0].register_forward_pre_hook(lambda module, given: seen.append((given[0].dtype, module.ln.weight)))
    run = trainer(settings(tmp_path / "low", steps=6, mixed_precision="bf16"), model)
    run.run()
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert seen[0][1].dtype == torch.bfloat16
    assert all(p is before[name] and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert model.head.weight is model.embedding.weight
    assert losses(tmp_path / "low") == pytest.approx(losses(tmp_path / "wide"), rel=0.02)


def test_accumulated_forwards_make_the_same_step(tmp_path: Path) -> None:
    class Halves(Data):
        def batches(self, size: int) -> Any:
            for batch in super().batches(2 * size):
                for n in range(2):
                    yield {name: value.chunk(2)[n] for name, value in batch.items()}

    trainer(settings(tmp_path / "one", steps=3)).run()
    trainer(settings(tmp_path / "two", steps=3, batch_size=2, accumulate=2), data=Halves()).run()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    plain = {"schedule": "cosine", "warmup": 2, "report_steps": 3, "checkpoint_steps": 4, "seed": 3}
    model = {"p_dropout": 0.2}
    trainer(settings(tmp_path / "one", steps=9, **plain), small_model(**model)).run()
    run = trainer(settings(tmp_path / "two", steps=9, **plain), small_model(**model))
    run.report = lambda report=run.report: report() if run.step < 6 else stop()  # type: ignore[method-assign]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = trainer(settings(tmp_path / "two", steps=9, **plain), small_model(**model))
    again.run()
    assert again.step == 9
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
from tests.training.runs import Data, settings, trainer
class Slow(Data):
    def batches(self, size):
        for batch in super().batches(size):
            print(self.at, flush=True)
            if self.at == {at} and {dies}:
                os.kill(os.getpid(), 9)
            __import__("time").sleep({wait})
            yield batch
run = trainer(settings({out!r}, steps=8, checkpoint_steps=3), data=Slow())
sys.exit(run.run())
"""


def program(out: Path, at: int = 0, dies: bool = False, wait: float = 0.0) -> str:
    return PROGRAM.format(root=str(ROOT), out=str(out), at=at, dies=dies, wait=wait)


def test_killed_and_resumed_equals_one_run(tmp_path: Path) -> None:
    trainer(settings(tmp_path / "one", steps=8)).run()
    dead = subprocess.run([sys.executable, "-c", program(tmp_path / "two", 6, True)], capture_output=True, cwd=ROOT)
    assert dead.returncode == -signal.SIGKILL
    assert len(losses(tmp_path / "two")) == 5  # two of which are made again
    trainer(settings(tmp_path / "two", steps=8, checkpoint_steps=3)).run()
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", program(tmp_path, wait=0.3)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "2":
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert Checkpoints(tmp_path).steps()[-1] == len(losses(tmp_path)) < 8


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", program(tmp_path, wait=30.0)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(2):  # to all processes of a job, and once more by torchrun: one signal
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143
    assert not Checkpoints(tmp_path).steps()


def test_one_directory_one_run(tmp_path: Path) -> None:
    run = trainer(settings(tmp_path, steps=1))
    with pytest.raises(ValueError, match=f"belongs to another run, process {os.getpid()} on "):
        trainer(settings(tmp_path, steps=1))
    run.close()
    trainer(settings(tmp_path, steps=1)).close()


class Poisoned(torch.nn.Module):
    """A model's loss, NaN in the forwards that are named."""

    def __init__(self, root: LMLoss, bad: set[int]):
        super().__init__()
        self.root, self.model, self.bad, self.n = root, root.model, bad, 0

    def count(self, batch: Any) -> torch.Tensor:
        return self.root.count(batch)

    def forward(self, batch: Any) -> torch.Tensor:
        self.n += 1
        return self.root(batch) * (float("nan") if self.n in self.bad else 1.0)


@pytest.mark.parametrize(("bad", "allowed"), [({4}, 0), ({4, 5, 6}, 2)])
def test_a_gradient_that_is_not_finite_is_never_saved(bad: set[int], allowed: int, tmp_path: Path) -> None:
    config = settings(tmp_path, steps=9, checkpoint_steps=3, report_steps=9, skip_nonfinite=allowed)
    run = trainer(config)
    run.root = Poisoned(run.root, bad)
    with pytest.raises(NonFiniteError, match=rf"NaN or infinite {len(bad)} time"):
        run.run()
    assert run.checkpoints.steps() == [3]


def test_a_few_bad_steps_are_left_out(tmp_path: Path) -> None:
    run = trainer(settings(tmp_path, steps=6, skip_nonfinite=2))
    run.root = Poisoned(run.root, {3, 4})
    assert run.run() == 0
    assert all(p.isfinite().all() for p in run.root.parameters())
    assert run.optimizer.state[next(run.root.parameters())]["step"] == 4


def test_the_last_good_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(settings(tmp_path, steps=6, checkpoint_steps=2, keep=3)).run()
    newest = tmp_path / "step_00000006"
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    next((tmp_path / "step_00000004").glob("*.distcp")).unlink()
    run = trainer(settings(tmp_path, steps=6, checkpoint_steps=2, keep=3))
    assert run.checkpoints.last_good() == tmp_path / "step_00000002"
    assert "step_00000006 is passed over" in caplog.text
    assert "missing" in caplog.text
    assert run.run() == 0
    assert run.checkpoints.last_good() == newest  # whole again
    assert len(losses(tmp_path)) == 6


def test_what_is_not_finished_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(settings(tmp_path, steps=4, checkpoint_steps=2))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    run.one_step = lambda *args, step=run.one_step: (  # type: ignore[method-assign]
        run.checkpoints.wait(),
        monkeypatch.setattr(checkpoint, "write_manifest", full) if run.step == 2 else None,
        step(*args),
    )
    with pytest.raises(OSError, match="No space"):
        run.run()
    assert Checkpoints(tmp_path).steps() == [2]
    assert not list(tmp_path.glob("*.writing"))


class Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


def test_the_metadata_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(settings(tmp_path / "out", steps=1))
    run.run()
    path = tmp_path / "out" / "step_00000001"
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir, which is code: refused"):
        checkpoint.load(path, run.root.model, run.optimizer)
    assert not (tmp_path / "ran").exists()
    (path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="not DCP's metadata"):
        checkpoint.load(path, run.root.model, run.optimizer)


def test_another_model_does_not_fit(tmp_path: Path) -> None:
    trainer(settings(tmp_path, steps=1)).run()
    with pytest.raises(CheckpointError, match=r"has shape \[61, 32\] for model.embedding.weight, .* needs \[70, 32\]"):
        trainer(settings(tmp_path, steps=2), small_model(src_vocab_size=70)).run()


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    run = trainer(settings(tmp_path, steps=5, checkpoint_steps=1, keep=2))
    run.run()
    assert run.checkpoints.steps() == [4, 5]
    with pytest.raises(ValueError, match="has a run of 5 steps"):
        trainer(settings(tmp_path, steps=5, resume="never")).run()


def test_held_out_data_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held_out = lambda: iter([batch for batch, _ in zip(Data().batches(3), range(2), strict=False)])
    config = settings(tmp_path, steps=4, eval_steps=2, sample_steps=4)
    trainer(config, held_out=held_out, sample=lambda root: "a sample").run()
    rows = [row for row in read_rows(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[2]["eval_loss"] < rows[1]["eval_loss"] < rows[0]["eval_loss"]
    assert "a sample" in capsys.readouterr().err
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,tokens,loss,eval_loss,grad_norm,lr")
    assert len(lines) == 1 + 4 + 3


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(settings(tmp_path, steps=3, tensorboard=True)).run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path))


def test_profile(tmp_path: Path) -> None:
    trainer(settings(tmp_path, steps=8, profile=str(tmp_path / "trace"))).run()
    events = json.loads((tmp_path / "trace" / "trace.json").read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)


def test_weight_decay_is_for_matrices() -> None:
    model = small_model(tie_heads=False)
    decays, rest = make_optimizer(model, 1e-3, 0.3).param_groups
    assert decays["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    assert {id(p) for p in rest["params"]} == {
        id(p) for name, p in model.named_parameters() if "norm" in name or "ln" in name or name == "embedding.weight"
    }


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 1 - 0.9 * 0.25, 1 - 0.9 * 0.5, 0.1]),
        ("cosine", [1 / 3, 2 / 3, 1, 1 - 0.9 * 0.1464466, 0.55, 0.1]),
        ("wsd", [1 / 3, 2 / 3, 1, 1, 0.55, 0.1]),
    ],
)
def test_schedules(kind: str, want: list[float]) -> None:
    share = make_schedule(kind, 6, warmup=2, decay=1 / 3)
    found = [share(step) for step in (0, 1, 2, 3, 5 if kind == "wsd" else 4, 6)]
    assert found == pytest.approx(want, abs=1e-6)


def test_flops_as_counted_by_hand() -> None:
    model = small_model(tie_heads=True)
    parameters = sum(p.numel() for p in model.parameters())
    assert flops_per_token(model, 16) == 6 * parameters + 12 * 2 * 4 * 8 * 16
    model = small_model(tie_heads=False)
    parameters = sum(p.numel() for p in model.parameters()) - 61 * 32
    assert flops_per_token(model, 16) == 6 * parameters + 12 * 2 * 4 * 8 * 16


def test_settings(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('architecture = "llama"\ndataset_path = "x"\nlr = 1e-3\n[model]\nnlayers = 2\n')
    config = TrainConfig.from_dict(read_settings(tmp_path / "run.toml"))
    assert (config.lr, config.model) == (1e-3, {"nlayers": 2})
    assert TrainConfig.from_dict(config.as_dict()) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmupp": 3}, "there is no setting 'warmupp' (did you mean 'warmup'?)"),
        ({"schedule": "cosin"}, "schedule='cosin' (did you mean 'cosine'?) must be one of"),
        ({"steps": 0}, "steps=0 must be more than 0"),
        ({"steps": "9"}, "steps='9' must be int"),
        ({"zero": 1}, "zero=1 must be 2 or 3"),
        ({"lora": 4, "distributed": "tp"}, "lora=4 can't go with distributed='tp'"),
        ({"sequence_parallel": True}, "are for distributed tp and tp+fsdp"),
        ({"architecture": None}, "which model?"),
        ({"dataset_path": None}, "which data?"),
    ],
)
def test_settings_that_can_not_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        settings("out", **options)
    assert words in str(error.value)


def test_a_stale_aside_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step_00000003.writing").mkdir()
    Checkpoints(tmp_path).close()
    assert not list(tmp_path.glob("*.writing"))


def test_lora_on_a_head_that_is_the_embedding() -> None:
    with pytest.raises(ValueError, match="this model's head is its embedding"):
        add_lora(small_model(tie_heads=True), 4, 8, ["query", "head"])
    with pytest.raises(ValueError, match="out: this model's head is its embedding"):
        add_lora(get_model("bert", None, **(SHAPE | {"pad_id": 1, "tie_heads": True})), 4, 8, ["out"])


def test_whole_numbers_become_others(tmp_path: Path) -> None:
    config = settings(tmp_path, weight_decay=0, lr=1)
    assert type(config.weight_decay) is type(config.lr) is float
