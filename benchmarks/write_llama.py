"""A Llama-2-7B of random weights as safetensors of Hugging Face's layout (13.5 GB), to be loaded by benchmarks.

    python benchmarks/write_llama.py DIR [--tiny]

Weights are drawn one at a time, on the GPU where there is one.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tensor_parallel import TINY

from fms.models.registry import build
from fms.utils.serialization.sources import get_source
from fms.utils.serialization.tables import entries
from fms.utils.serialization.writers import Entry, write_safetensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="a small one")
    args = parser.parse_args()
    begun = time.monotonic()
    with torch.device("meta"):
        model = build("llama", "2-7b", TINY if args.tiny else {})
    source: Any = get_source("llama", "hf")
    state = [Entry(name, tuple(p.shape), torch.bfloat16, lambda p=p: drawn(p)) for name, p in model.named_parameters()]
    aside = args.path.with_suffix(".part")  # the directory appears when it is whole
    aside.mkdir(parents=True)
    write_safetensors(aside, entries(source.rules, state, model.config))
    settings = source.config.write(model.config) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (aside / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    aside.rename(args.path)
    print(json.dumps({"written": str(args.path), "seconds": round(time.monotonic() - begun, 1)}), flush=True)


def drawn(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.dim() == 1:  # a norm
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(parameter.shape, dtype=torch.bfloat16, device=device).mul_(0.02)


if __name__ == "__main__":
    main()
