"""torchtitan 0.2.2 for benchmarks/training.py: its Trainer and its step, without its tokenizer and its data."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


def build(
    form: dict[str, Any], seq_len: int, folder: str, rows: Callable[[int], Iterator[torch.Tensor]]
) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step of a form on what `rows` gives to a rank of the data, and what was made; what it writes is in `folder`."""
    shape = form["shape"]
    if not torch.cuda.is_available():
        rehearse()
    for name, value in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", "29511")
    import torchtitan
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.components.lr_scheduler import build_lr_schedulers
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3.infra.parallelize import parallelize_llama
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer
    from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
    from torchtitan.train import Trainer

    class Rows(BaseDataLoader):
        def __init__(self, dp_rank: int, **_: Any):
            self.place = dp_rank

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            for ids in rows(self.place):
                yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    plain = shape["emb_dim"] * 4 * 2 // 3
    size = TransformerModelArgs(
        dim=shape["emb_dim"],
        n_layers=shape["nlayers"],
        n_heads=shape["nheads"],
        n_kv_heads=shape["kvheads"],
        vocab_size=shape["src_vocab_size"],
        multiple_of=1024,
        ffn_dim_multiplier=shape["hidden_dim"] / plain - 0.01,
        rope_theta=500000,
    )
    spec = TrainSpec(
        model_cls=Transformer,
        model_args={"this": size},
        parallelize_fn=parallelize_llama,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=Rows,
        build_tokenizer_fn=None,
        build_loss_fn=build_cross_entropy_loss,
    )
    register_train_spec("this", spec)
    config = JobConfig()
    config.job.dump_folder = folder
    config.model.name, config.model.flavor = "this", "this"
    config.training.local_batch_size, config.training.seq_len = form["batch"], seq_len
    config.training.steps = 10_000
    config.training.dtype = "bfloat16" if form["dtype"] == "bf16" else "float32"
    config.parallelism.tensor_parallel_degree = form["ranks"] if form["distributed"] == "tp" else 1
    config.activation_checkpoint.mode = form["recompute"]
    config.compile.enable = form.get("compile") != "none"
    config.optimizer.implementation = "fused" if torch.cuda.is_available() else "foreach"
    config.metrics.log_freq = 1_000_000  # it would wait for the GPU
    config.checkpoint.enable = False
    trainer = Trainer(config)
    batches = trainer.batch_generator(trainer.dataloader)
    model = trainer.model_parts[0]
    if not torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    hidden = model.layers["0"].feed_forward.w1.weight.shape[0]
    if hidden != shape["hidden_dim"]:
        raise ValueError(f"torchtitan made {hidden} hidden channels, not {shape['hidden_dim']}")
    more = {"version": torchtitan.__version__, "parameters": sum(p.numel() for p in model.parameters())}
    more |= {
        "optimizer": config.optimizer.implementation,
        "compiled": config.compile.enable and config.compile.components,
    }

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)

    return step, more


def rehearse() -> None:
    """Let torchtitan take a CPU for its GPU."""
    from types import SimpleNamespace
    from unittest.mock import MagicMock

    import torch._utils as inside

    gpu = MagicMock()
    gpu.get_device_properties.return_value = SimpleNamespace(total_memory=1 << 30)
    gpu.get_device_name.return_value, gpu.memory_stats.return_value = "cpu", {}
    inside._get_available_device_type, inside._get_device_module = lambda: "cpu", lambda kind: gpu
