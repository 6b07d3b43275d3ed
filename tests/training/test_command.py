"""`fms train` from a text file to a model that transformers reads, and the existing script's flags."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fms.cli import main
from fms.training.metrics import read_rows
from tests.tiny import LINES, write_tiny_chat

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{line} {n}"}) + "\n" for n in range(20) for line in LINES))
    return file


def words(text: Path, *more: object) -> list[str]:
    plain = ["--dataset_path", text, "--seq_len", 16, "--batch_size", 2, "--steps", 4, "--report_steps", 2, *more]
    return [str(word) for word in ("--device_type", "cpu", "--held_out", 0.3, "--eval_batches", 2, *plain)]


def test_tuned_and_back_to_transformers(tmp_path: Path, text: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from fms.models import get_model

    model, out = write_tiny_chat(tmp_path / "model"), tmp_path / "out"
    more = ["--model_path", model, "--output", out, "--export", "hf", "--sample_steps", 4, "--lr", 1e-2]
    assert main(["train", *words(text, *more)]) == 0
    rows = read_rows(out)
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert "eval_loss" in rows[-1]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = get_model(model_path=out / "export").eval()(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "export").eval()(ids).logits
        before = get_model(model_path=model).eval()(ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_lora(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("peft")
    from fms.models import get_model

    model = write_tiny_chat(tmp_path / "model")
    more = ["--model_path", model, "--lora", 4, "--lora_targets", "query,w1", "--lr", 1e-2, "--schedule", "constant"]
    assert main(["train", *words(text, *more, "--output", tmp_path / "one", "--export", "hf")]) == 0
    for steps in (2, 4):
        assert main(["train", *words(text, *more, "--output", tmp_path / "two", "--steps", steps)]) == 0
    told = [[row["loss"] for row in read_rows(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert told[0] == told[1]
    before, after = get_model(model_path=model), get_model(model_path=tmp_path / "one" / "export")
    ours = dict(after.named_parameters())
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, ours[name])}
    assert changed == {f"layers.{n}.{part}.weight" for n in range(2) for part in ("attn.query", "ff.w1")}
    assert main(["train", *words(text, *more, "--output", tmp_path / "three", "--lora_targets", "query,q_proj")]) == 2
    assert "no linear layer is called 'q_proj'; there are query, key, value, dense, wg" in capsys.readouterr().err


def test_an_encoder_by_masked_words(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
    from tokenizers.models import WordLevel

    from fms.models import get_model

    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    made = Tokenizer(WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=list(names.values()), show_progress=False))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **{f"{k}_token": v for k, v in names.items()})
    fast.save_pretrained(tmp_path / "words")
    shape = f"src_vocab_size={len(fast)},emb_dim=32,nheads=4,nlayers=2,hidden_dim=48,max_expected_seq_len=32"
    more = ["--architecture", "bert", "--tokenizer", tmp_path / "words", "--model", shape, "--output", tmp_path / "out"]
    more += ["--steps", 40, "--batch_size", 8, "--report_steps", 10, "--lr", 1e-2, "--export", "hf"]
    assert main(["train", *words(text, *more, "--objective", "masked")]) == 0
    told = [row["loss"] for row in read_rows(tmp_path / "out") if "loss" in row]
    assert told[-1] < told[0]
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        ours = get_model(model_path=tmp_path / "out" / "export").eval()(ids)
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "export").eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert main(["train", *words(text, *more, "--objective", "masked", "--mask_token", "[MUSK]")]) == 2
    assert "the tokenizer has no token [MUSK]" in capsys.readouterr().err


def test_epochs_in_place_of_steps(tmp_path: Path, text: Path) -> None:
    more = ["--model_path", write_tiny_chat(tmp_path / "model"), "--output", tmp_path / "out", "--report_steps", 100]
    assert main(["train", *words(text, *more, "--epochs", 0.5, "--batch_size", 8)]) == 0
    last = read_rows(tmp_path / "out")[-1]
    rows = last["step"] * 8 * 2
    tokens = read_rows(tmp_path / "out")[0]["tokens"]
    assert tokens == last["step"] * 8 * 16
    from fms.datasets import get_dataset
    from fms.utils.tokenizers import get_tokenizer

    data = get_dataset("text", get_tokenizer(str(tmp_path / "model")), text, seq_len=16, held_out=0.3)
    assert data.rows <= rows < data.rows + 16


def test_the_script_takes_the_flags_of_the_existing_one(tmp_path: Path, text: Path) -> None:
    more = ["--architecture", "llama", "--variant", "micro", "--model", "nlayers=1,emb_dim=32,nheads=4,kvheads=4"]
    more += ["--tokenizer", "char_tokenizer", "--output_path", tmp_path / "out", "--distributed=none"]
    more = ["--dataset_style", "text", *more]
    command = [sys.executable, "scripts/train_causal.py", *words(text, *more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 4: loss" in done.stderr


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"stepz": 3}))
    assert main(["train", "--config", str(tmp_path / "run.json")]) == 2
    assert "there is no setting 'stepz' (did you mean 'steps'?)" in capsys.readouterr().err
    more = ["--architecture", "llama", "--tokenizer", "char_tokenizer", "--output", tmp_path / "out"]
    assert main(["train", *words(text, *more, "--distributed", "fsdp")]) == 2
    assert "start with torchrun" in capsys.readouterr().err


def test_out_of_memory_says_what_takes_less(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    huge = f"nlayers=1,emb_dim=32,nheads=4,kvheads=4,head_dim=8,hidden_dim={10**12}"
    more = ["--architecture", "llama", "--variant", "micro", "--tokenizer", "char_tokenizer", "--model", huge]
    assert main(["train", *words(text, *more, "--output", tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "out of memory: " in said
    assert "a smaller --batch_size with --accumulate" in said
    assert "Traceback" not in said


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "tokens_per_second": 9}\n{"step": 2, "eval_loss":'
    )
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plot", str(tmp_path)]) == 2
    assert "no rows" in capsys.readouterr().err
