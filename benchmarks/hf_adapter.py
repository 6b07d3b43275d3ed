"""Hugging Face's `generate` on one GPU: transformers' own Llama beside ours through `to_hf_api`, on the same weights.

    python benchmarks/hf_adapter.py [--json FILE] [--only WORD ...] [--within 90]

Llama-2-7B's shape, random weights in bf16, batch 2, 512 tokens in, 64 out, greedy. The weights are drawn once, by
transformers, and copied into ours. Figures are milliseconds a token of whole calls (the prefill in them), medians after
warm-up. A cell that fails is told and left out; one that would begin after `--within` seconds is not begun.
`--device cpu --tiny` tries the script out where there is no GPU.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from fms.models import freeze, get_model  # noqa: E402
from fms.models.hf import to_hf_api  # noqa: E402

NAMES = {  # ours: theirs
    "embedding": "embed_tokens",
    "dec_norm": "norm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.dense": "self_attn.o_proj",
    "ff.wg": "mlp.gate_proj",
    "ff.w1": "mlp.up_proj",
    "ff.w2": "mlp.down_proj",
    "ff_ln": "post_attention_layernorm",
    "ln": "input_layernorm",
}
STATIC = {"cache_implementation": "static"}  # of which transformers compiles the decode steps by itself, on a GPU
SHAPE: dict[str, Any] = {"nlayers": 32, "emb_dim": 4096, "nheads": 32, "hidden_dim": 11008, "src_vocab_size": 32000}
TINY = {"nlayers": 2, "emb_dim": 64, "nheads": 4, "kvheads": 4, "head_dim": 16, "hidden_dim": 96, "src_vocab_size": 320}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose name has one of these")
    parser.add_argument("--within", type=float, default=90, metavar="SECONDS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    bench = Bench(args)
    bench.run()
    cuda = args.device == "cuda"
    figures = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "shape": TINY if args.tiny else SHAPE,
        "batch": args.batch,
        "prompt": args.prompt,
        "new": args.new,
        "seconds": round(time.perf_counter() - START, 1),
        "cells": bench.cells,
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    print(table(bench.cells))


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.cells = args, {}
        self.theirs, self.ours = models(TINY if args.tiny else SHAPE, args.device)
        self.hf = to_hf_api(self.ours, eos_token_id=None)
        self.ids = torch.randint(self.theirs.config.vocab_size, (args.batch, args.prompt), device=args.device)
        print(f"# models after {time.perf_counter() - START:.1f} s", flush=True)

    def run(self) -> None:
        """All cells, the most wanted first where the order is free: freezing is for good."""
        theirs, hf = self.theirs, self.hf
        self.cell("transformers, eager", theirs)
        self.cell("transformers, static cache, compiled", theirs, **STATIC)
        self.compare("not frozen")
        self.cell("fms, eager", hf)
        self.theirs = theirs = None  # its memory, and what its compiled steps hold
        freeze(self.ours)
        self.cell("fms, frozen, eager", hf)
        hf.decoder = torch.compile(hf.decoder)
        self.cell("fms, frozen, decoder compiled", hf)
        hf.decoder = self.ours
        self.cell("fms, frozen, static cache, compiled", hf, **STATIC)

    def cell(self, name: str, model: Any, **options: Any) -> None:
        """Time `generate` with these options."""
        if self.args.only and not any(word in name for word in self.args.only):
            return
        begun = time.perf_counter() - START
        if begun > self.args.within:
            self.cells[name] = {"error": f"not begun, after {begun:.0f} s"}
            return
        try:
            self.cells[name] = self.timed(model, options)
        except Exception as error:
            self.cells[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
        gc.collect()
        print(f"# {name}: {json.dumps(self.cells[name])}", flush=True)

    def timed(self, model: Any, options: dict[str, Any]) -> dict[str, Any]:
        new, cuda = self.args.new, self.args.device == "cuda"
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0} | options
        mask = torch.ones_like(self.ids)

        def call() -> torch.Tensor:
            return model.generate(self.ids, attention_mask=mask, **options)

        start = time.perf_counter()
        first, _ = call(), call()
        self.wait()
        warm = time.perf_counter() - start
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found = [self.seconds(call) * 1e3 / new for _ in range(self.args.repeats)]
        assert first.shape == (self.args.batch, self.args.prompt + new), first.shape
        return {
            "ms": round(statistics.median(found), 3),
            "all": [round(ms, 3) for ms in found],
            "warm_up_s": round(warm, 1),
            "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        }

    def compare(self, name: str) -> None:
        """How far our logits are from theirs, beside how far theirs are from zero."""
        try:
            want, got = (model(self.ids).logits[:, -1].float() for model in (self.theirs, self.hf))
            self.cells[f"logits, {name}"] = {
                "largest_difference": float((want - got).abs().max()),
                "largest": float(want.abs().max()),
            }
        except Exception as error:
            self.cells[f"logits, {name}"] = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(f"# {self.cells[f'logits, {name}']}", flush=True)

    def seconds(self, what: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        what()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()


def models(shape: dict[str, Any], device: str) -> tuple[Any, Any]:
    """transformers' model and ours of the same weights."""
    config = LlamaConfig(
        num_hidden_layers=shape["nlayers"],
        hidden_size=shape["emb_dim"],
        num_attention_heads=shape["nheads"],
        intermediate_size=shape["hidden_dim"],
        vocab_size=shape["src_vocab_size"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        theirs = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    theirs.generation_config.eos_token_id = theirs.generation_config.bos_token_id = None
    ours = get_model("llama", "7b", device_type=device, data_type="bf16", **shape).eval()
    weights = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        parameter.copy_(weights.pop(their_name(name)))
    assert not weights, weights.keys()
    return theirs, ours


def their_name(name: str) -> str:
    """`layers.3.attn.query.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    if name == "head.weight":
        return "lm_head.weight"
    parts = name.split(".")
    start = parts[:2] if parts[0] == "layers" else []
    return ".".join(["model", *start, NAMES[".".join(parts[len(start) : -1])], parts[-1]])


def table(cells: dict[str, Any]) -> str:
    """In Markdown; every cell of ours beside transformers' eager and compiled ones."""
    rows = [["", "ms a token", "of its eager", "of its compiled", "warm-up, s"], ["---", *["---:"] * 4]]
    anchors = [cells.get(f"transformers, {how}", {}).get("ms") for how in ("eager", "static cache, compiled")]
    for name, cell in cells.items():
        if "ms" in cell:
            ratios = ["" if anchor is None else f"{cell['ms'] / anchor:.2f}" for anchor in anchors]
            rows.append([name, f"{cell['ms']:.2f}", *ratios, f"{cell['warm_up_s']:.0f}"])
        elif "error" in cell:
            rows.append([name, cell["error"].splitlines()[0][:80], "", "", ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
