"""A run of a small model in memory on data that knows its place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fms.models import get_model
from fms.training.config import TrainConfig
from fms.training.loop import Trainer
from fms.training.objective import LMLoss

SHAPE: dict[str, Any] = {
    "src_vocab_size": 61,
    "emb_dim": 32,
    "nheads": 4,
    "nlayers": 2,
    "hidden_dim": 48,
    "max_expected_seq_len": 32,
}
DECODER = SHAPE | {"kvheads": 2, "head_dim": 8, "pad_id": None}
CPU = torch.device("cpu")


class Data:
    """Sequences that count on from a random token; this rank's batches of all ranks'."""

    def __init__(self, rank: int = 0, world: int = 1, seq_len: int = 12, vocab: int = 61):
        self.rank, self.world, self.seq_len, self.vocab, self.at = rank, world, seq_len, vocab, 0

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        while True:
            draw = torch.Generator().manual_seed(self.at)
            rows = torch.randint(self.vocab, (size * self.world, 1), generator=draw)
            ids = (rows + torch.arange(self.seq_len)) % self.vocab
            ids[:, -2:] = torch.randint(self.vocab, (len(rows), 2), generator=draw)
            self.at += 1
            mine = ids[self.rank * size : (self.rank + 1) * size]
            yield {"input_ids": mine, "labels": mine.clone()}

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def settings(output: Path | str, **more: Any) -> TrainConfig:
    plain = {"architecture": "llama", "dataset_path": "-", "output": str(output), "seq_len": 12, "batch_size": 4}
    plain |= {"report_steps": 1, "checkpoint_steps": 0, "lr": 1e-2, "schedule": "constant"}
    return TrainConfig.from_dict(plain | more)


def small_model(architecture: str = "llama", variant: str = "micro", **fields: Any) -> Any:
    torch.manual_seed(0)
    return get_model(architecture, variant, **(DECODER | fields))


def trainer(config: TrainConfig, model: Any = None, **more: Any) -> Trainer:
    root = LMLoss(small_model() if model is None else model, config.objective)
    return Trainer(root, more.pop("data", None) or Data(), config, CPU, **more)
