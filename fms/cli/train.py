"""`fms train`: a model from scratch or from a checkpoint, on one process or many."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms.cli import flags

if TYPE_CHECKING:
    from fms.training.config import TrainConfig

PATHS = ("model_path", "tokenizer", "dataset_path", "eval_path", "output", "profile")
COUNTED_FROM = {  # where a group of flags begins
    "architecture": "model",
    "dataset": "data",
    "steps": "course",
    "distributed": "ranks, memory and speed",
    "output": "what it leaves",
}


def add_flags(parser: Any) -> None:
    """A flag for each setting. Those that are not given stay unset: the file says them, or the default."""
    from fms.training.config import TrainConfig

    parser.add_argument(
        "--config", type=flags.path, metavar="FILE", help=".toml or .json of settings; flags win (default: none)"
    )
    group = parser
    for entry in fields(TrainConfig):
        if entry.name in COUNTED_FROM:
            group = parser.add_argument_group(COUNTED_FROM[entry.name])
        words = entry.metadata["help"]
        if "(default" not in words:
            plain = entry.default if isinstance(entry.default, str | int | float) else "none"
            words += f" (default: {'off' if plain is False else plain})"
        more: dict[str, Any] = {"action": "store_true"}
        if entry.type is not bool:
            more = {"type": kind_of(entry.name, entry.type), "choices": entry.metadata["choices"]}
            more |= {} if more["choices"] else {"metavar": "PATH" if entry.name in PATHS else "VALUE"}
        group.add_argument(f"--{entry.name}", default=None, help=words.replace("%", "%%"), **more)
    flags.add_debug(parser)


def kind_of(name: str, kind: Any) -> Callable[[str], Any]:
    if name in PATHS:
        return flags.path
    return assignments if name in ("model", "data") else kind if kind in (int, float) else str


def assignments(text: str) -> dict[str, Any]:
    """`nlayers=4,tie_heads=true` as values; what is no JSON is a word."""
    found = {}
    for pair in text.split(","):
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise argparse.ArgumentTypeError(f"{pair!r} must be NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def settings(args: argparse.Namespace) -> "TrainConfig":
    from fms.training.config import TrainConfig, read_settings

    values = read_settings(args.config) if args.config else {}
    given = {entry.name: getattr(args, entry.name, None) for entry in fields(TrainConfig)}
    return TrainConfig.from_dict(values | {name: value for name, value in given.items() if value is not None})


def run(args: argparse.Namespace) -> int:
    from fms.utils.devices import is_out_of_memory

    try:
        return train(settings(args))
    except RuntimeError as error:
        if not is_out_of_memory(error) or args.debug:
            raise
        raise ValueError(
            f"out of memory: {str(error).splitlines()[0]} (less takes: a smaller --batch_size with --accumulate, or "
            "--seq_len; --activation_checkpointing full; --mixed_precision bf16; --distributed fsdp on more ranks)"
        ) from None


def train(config: "TrainConfig") -> int:
    """The whole run that the settings describe. Returns the exit code: 0, or 143 or 130 after a signal."""
    import torch

    from fms.distributed.launch import launch
    from fms.distributed.mesh import data_place
    from fms.training.loop import Trainer
    from fms.training.parallel import mesh_for

    device = launch(config.device_type, config.timeout)
    mesh = mesh_for(config, device)
    place = data_place(mesh)
    tokenizer = find_tokenizer(config)
    data, held_out = find_data(config, tokenizer, place)
    config = in_steps(config, data.rows, place[1])

    torch.manual_seed(config.seed)
    root = find_root(config, device, mesh, tokenizer)
    prepare = masking(config, tokenizer) if config.objective == "masked" else None
    sample = sampler(config, tokenizer) if config.sample_steps else None
    code = Trainer(root, data, config, device, mesh, place, held_out, prepare, sample).run()
    if not code and config.export != "none":
        export(root.model, config, tokenizer)
    return code


def find_root(config: "TrainConfig", device: Any, mesh: Any, tokenizer: Any) -> Any:
    """The model with its loss, ready to be trained: each technique in its turn (docs/architecture.md says why so)."""
    from fms.models.compile import compile_model
    from fms.training.lora import add_lora
    from fms.training.objective import LMLoss
    from fms.training.parallel import recompute, share_out

    model = find_model(config, device, mesh, tokenizer)
    if config.lora:
        add_lora(model, config.lora, config.lora_alpha, config.lora_targets.split(","))
    recompute(model, config.activation_checkpointing)
    compile_model(model, config.compile)
    return share_out(LMLoss(model, config.objective), config, mesh)


def find_tokenizer(config: "TrainConfig") -> Any:
    from fms.utils.serialization.checkpoint import local_path
    from fms.utils.tokenizers import get_tokenizer

    if config.tokenizer is not None:
        return get_tokenizer(config.tokenizer)
    if config.model_path is None:
        raise ValueError("which tokenizer? A new model has none: --tokenizer PATH, or char_tokenizer")
    path = local_path(config.model_path)
    return get_tokenizer(str(path.parent if path.is_file() and path.suffix != ".gguf" else path))


def find_model(config: "TrainConfig", device: Any, mesh: Any, tokenizer: Any) -> Any:
    from fms.models import get_model

    strategy: Any = "none"
    if mesh is not None and "tp" in config.distributed:
        from fms.distributed.strategy import TensorParallel

        strategy = TensorParallel(mesh["tp"], sequence_parallel=config.sequence_parallel, pad=False)
    model = get_model(
        config.architecture,
        config.variant,
        config.model_path,
        config.source,
        str(device),
        config.dtype,
        strategy,
        **config.model,
    )
    size = model.config.src_vocab_size
    if tokenizer.vocab_size() > size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size()} tokens, the model's vocabulary {size}")
    if config.seq_len > model.config.max_positions:
        raise ValueError(f"seq_len={config.seq_len} is more than the model's {model.config.max_positions} positions")
    return model


def find_data(config: "TrainConfig", tokenizer: Any, place: tuple[int, int]) -> tuple[Any, Callable | None]:
    """What is trained on, and what gives held-out batches anew."""
    from fms.datasets import get_dataset

    rank, world = place

    def dataset(path: str | None, seed: int = config.seed, **split: Any) -> Any:
        return get_dataset(
            config.dataset,
            tokenizer,
            path,
            seq_len=config.seq_len,
            seed=seed,
            rank=rank,
            world=world,
            reset_attention=config.reset_attention,
            **split,
            **config.data,
        )

    look = {"shuffle": True, "seed": 0}  # the first batches are of all documents, and the same ones in every run
    if config.eval_path is None and not config.held_out:
        return dataset(config.dataset_path, held_out=0.0), None
    if config.eval_path is None:
        data = dataset(config.dataset_path, held_out=config.held_out)
        held_out = dataset(config.dataset_path, held_out=config.held_out, split="held_out", **look)
    else:
        data = dataset(config.dataset_path, held_out=0.0)
        held_out = dataset(config.eval_path, held_out=0.0, epochs=1, **look)
    return data, lambda: again(held_out).batches(config.batch_size)


def in_steps(config: "TrainConfig", rows: int, world: int) -> "TrainConfig":
    """With the steps that its epochs take on data of so many rows."""
    if not config.epochs:
        return config
    return replace(config, steps=math.ceil(rows * config.epochs / (config.batch_size * config.accumulate * world)))


def again(data: Any) -> Any:
    """The same data from the beginning."""
    data.epoch = data.row = 0
    return data


def masking(config: "TrainConfig", tokenizer: Any) -> Any:
    from fms.training.objective import Masking

    names = [config.mask_token] if config.mask_token else ["[MASK]", "<mask>"]
    ends = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad", "cls", "sep"))
    special = {i for i in ends if i is not None}
    for name in names:
        ids = tokenizer.encode(name)
        inner = [i for i in ids if i not in special]
        if len(inner) == 1:
            return Masking(inner[0], tokenizer.vocab_size(), special)
    raise ValueError(f"the tokenizer has no token {' or '.join(names)}: name the one that hides others, --mask_token")


def sampler(config: "TrainConfig", tokenizer: Any) -> Callable[[Any], str]:
    from fms.training.sample import continuation

    if config.objective != "causal":
        raise ValueError("sample_steps is for the objective causal: masked words are no text that goes on")
    ids = tokenizer.encode(config.sample_prompt)

    def sample(root: Any) -> str:
        return f"  {config.sample_prompt}{tokenizer.decode(continuation(root, ids, config.seq_len))}"

    return sample


def export(model: Any, config: "TrainConfig", tokenizer: Any) -> None:
    """The model as one process has it, in --output/export, replacing what is there."""
    from fms.models.convert import save_model
    from fms.training.lora import merge_lora
    from fms.training.parallel import whole
    from fms.training.ranks import agreed, rank

    whole(model, keep=rank() == 0)
    if config.lora and rank() == 0:
        merge_lora(model)
    out = Path(config.output).expanduser() / "export"
    agreed(lambda: save_model(model, out, config.export, tokenizer=tokenizer, overwrite=True))
