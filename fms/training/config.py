"""The settings of a run: fields with their flags' words, from a TOML or JSON file, from flags, or both."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from fms.utils.serialization.errors import nearest

STRATEGIES = ("none", "ddp", "fsdp", "hsdp", "tp", "tp+fsdp")


def _of(default: Any, words: str, *choices: str) -> Any:
    """A field with what its flag says of itself and, where there are only some, its values."""
    return field(default=default, metadata=_words(words, *choices))


def _words(words: str, *choices: str) -> dict[str, Any]:
    return {"help": words, "choices": choices or None}


@dataclass(frozen=True)
class TrainConfig:
    """Counts of tokens and steps; `batch_size` is that of one rank's forward. Raises `ValueError` for what can't be."""

    # the model
    architecture: str | None = _of(None, "as `fms models` lists them (default: what the weights say)")
    variant: str | None = _of(None, "as `fms models` lists them (default: what the weights say)")
    model_path: str | None = _of(None, "directory, file or Hub id of the weights to begin with (default: random ones)")
    source: str | None = _of(None, "format of the weights: hf, meta, gguf, fms, own (default: found out)")
    tokenizer: str | None = _of(None, "file, directory, Hub id or char_tokenizer (default: the one beside the weights)")
    model: dict[str, Any] = field(
        default_factory=dict, metadata=_words("changes of the model's configuration, as nlayers=4, with commas between")
    )
    device_type: str = _of("auto", "cpu, cuda or auto: a GPU if there is one")
    dtype: str = _of("fp32", "of the weights and their optimizer states", "fp32", "bf16")
    lora: int = _of(0, "rank of LoRA's matrices, which alone are trained, by peft; 0: everything is trained")
    lora_alpha: float = _of(16.0, "LoRA's scale is this over its rank")
    lora_targets: str = _of("query,key,value,dense", "modules that get LoRA's matrices, with commas between")
    # the data
    dataset: str = _of("text", "name of the dataset, as get_dataset knows it")
    dataset_path: str | None = _of(None, "file or directory of the data")
    held_out: float = _of(0.05, "share of the documents that is not trained on, to look at the loss of; 0: none")
    eval_path: str | None = _of(None, "data to look at the loss of instead (default: the share that is held out)")
    data: dict[str, Any] = field(
        default_factory=dict, metadata=_words("options of the dataset, as field=body, with commas between")
    )
    reset_attention: bool = _of(False, "documents that share a sequence do not see each other")
    seq_len: int = _of(512, "tokens of a sequence")
    batch_size: int = _of(8, "sequences of a rank's forward")
    accumulate: int = _of(1, "forwards whose gradients make a step")
    objective: str = _of("causal", "causal: the next token; masked: words of an encoder", "causal", "masked")
    mask_token: str | None = _of(None, "the token that hides others, for masked (default: [MASK] or <mask>)")
    # the course
    steps: int = _of(1000, "of the optimizer, in all")
    epochs: float = _of(0.0, "passes over the data, in place of steps; 0: as many steps as are said")
    lr: float = _of(3e-4, "learning rate at its highest")
    schedule: str = _of("cosine", "its course after the warm-up", "cosine", "linear", "wsd", "constant")
    warmup: int = _of(0, "steps over which it rises")
    least_lr: float = _of(0.1, "share of it at the end")
    decay: float = _of(0.2, "share of the steps over which wsd falls")
    weight_decay: float = _of(0.1, "of matrices")
    beta1: float = _of(0.9, "AdamW's memory of gradients")
    beta2: float = _of(0.95, "AdamW's memory of their squares")
    clip: float = _of(1.0, "largest norm of the gradient; 0: any")
    seed: int = _of(0, "of weights, data and dropout")
    skip_nonfinite: int = _of(0, "steps in a row without a finite gradient that are left out before it is an error")
    # how it runs
    distributed: str = _of("none", "how torchrun's processes share the work", *STRATEGIES)
    tp: int = _of(0, "ranks that share a model, for tp and tp+fsdp; 0: all, or 2 of tp+fsdp")
    replicate: int = _of(2, "copies of the parameters, for hsdp")
    zero: int = _of(3, "for fsdp: 3 frees gathered parameters after the forward, 2 keeps them for the backward")
    sequence_parallel: bool = _of(False, "ranks of a tp group share out the tokens between sub-layers")
    mixed_precision: str = _of("none", "what is computed in, above weights in fp32", "none", "bf16")
    activation_checkpointing: str = _of(
        "none", "compute blocks again in the backward: all, or all but products", "none", "full", "selective"
    )
    compile: str = _of("none", "torch.compile of the block that layers share", "none", "blocks", "max")
    timeout: float = _of(300.0, "seconds that a rank waits for another")
    # what it leaves
    output: str = _of("run", "directory of checkpoints and metrics; one run at a time")
    report_steps: int = _of(10, "steps between two lines of metrics; the last step has one too")
    checkpoint_steps: int = _of(500, "steps between two checkpoints; 0: only at the end")
    keep: int = _of(2, "checkpoints that stay")
    resume: str = _of("auto", "auto: from the last good checkpoint of --output; never; or a checkpoint's directory")
    eval_steps: int = _of(0, "steps between two looks at held-out data, from the beginning on; 0: only at the end")
    eval_batches: int = _of(50, "batches of such a look, at most")
    sample_steps: int = _of(0, "steps between two samples of text, from the beginning on; 0: none")
    sample_prompt: str = _of("The", "what samples continue")
    export: str = _of("none", "format of the model that is written at the end to --output/export", "none", "hf", "own")
    tensorboard: bool = _of(False, "write TensorBoard's events too")
    profile: str | None = _of(None, "directory of a timeline of steps 5 to 7 (default: none)")

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry, value := getattr(self, entry.name))
            if entry.type is float:
                object.__setattr__(self, entry.name, float(value))
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2")
        if self.zero not in (2, 3):
            raise ValueError(f"zero={self.zero} must be 2 or 3")
        if self.distributed not in ("tp", "tp+fsdp") and (self.sequence_parallel or self.tp > 1):
            raise ValueError(f"tp and sequence_parallel are for distributed tp and tp+fsdp, not {self.distributed!r}")
        if self.lora and "tp" in self.distributed:
            raise ValueError(
                f"lora={self.lora} can't go with distributed={self.distributed!r}: its matrices would not be split as "
                "the weights beside them are; take fsdp"
            )
        if self.model_path is None and self.architecture is None:
            raise ValueError("which model? --model_path DIRECTORY to tune one, --architecture llama for a new one")
        if self.dataset_path is None and self.dataset not in ("mock", "instruction"):  # the latter has a default
            raise ValueError("which data? --dataset_path FILE")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises `ValueError` for a setting that there is not, naming the nearest."""
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"there is no setting {name!r}{nearest(name, known)}")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_settings(file: str | Path) -> dict[str, Any]:
    """The settings of a .toml or .json file."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not {path.suffix.lstrip('.') or 'JSON'}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: settings are names with values, this is a {type(values).__name__}")
    return values


POSITIVE = {"batch_size", "accumulate", "steps", "report_steps", "keep", "eval_batches", "replicate", "timeout", "lr"}


def _check(entry: Field, value: Any) -> None:
    kinds: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    wanted = kinds.get(entry.type)
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and entry.type is not bool)):
        raise ValueError(f"{entry.name}={value!r} must be {getattr(entry.type, '__name__', entry.type)}")
    choices = entry.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{entry.name}={value!r}{nearest(str(value), choices)} must be one of {', '.join(choices)}")
    number = entry.type in (int, float) and entry.name != "seed"
    if number and (value < 0 or (value == 0 and entry.name in POSITIVE)):
        raise ValueError(f"{entry.name}={value} must be {'more than' if entry.name in POSITIVE else 'at least'} 0")
