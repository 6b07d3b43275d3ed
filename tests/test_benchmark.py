"""`fms benchmark` and its script, on a micro model: cells, checks, tables, files."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fms.cli import main
from fms.models import freeze
from fms.models.compile import compile_model
from fms.utils import benchmark, measure
from fms.utils.benchmark import BOTH, CAPTURED, COMPILED, EAGER, MODES, PLAIN, Bench, Cell
from fms.utils.figures import COLUMNS, tables
from tests.small import small_model
from tests.utils.test_capture import Played

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "scripts" / "benchmark_inference.py")
SMALL = ["--architecture", "llama", "--variant", "micro", "--device_type", "cpu", "--dtype", "fp32"]
SMALL += ["--max_new_tokens", "3", "--repeats", "2", "--bandwidth", "10"]
QUICK = [*SMALL, "--skip_compile_runs", "--seq_len", "8"]
KINDS = list(COLUMNS.values())
MACHINE = {"model": "m", "dtype": "float32", "ranks": 1, "device": "d", "torch": "t", "bandwidth_gb_s": 1.0}
MACHINE |= {"compile": "blocks"}


@pytest.fixture
def bench() -> Bench:
    return Bench(freeze(small_model()), 2, 9, 4, bandwidth=1e9)


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        code = main(["benchmark", *words])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


# Cells


@pytest.mark.parametrize("mode", [EAGER, PLAIN], ids=lambda mode: mode.name)
@pytest.mark.parametrize(("task", "cached"), KINDS)
def test_a_cell_is_measured_and_right(bench, mode, task, cached):
    if not mode.has(cached):
        return
    cell = bench.cell(mode, task, cached)
    assert (cell.batch_size, cell.seq_len, cell.new_tokens) == (2, 9, 4)
    assert len(cell.repeats) == 3
    assert cell.ms == sorted(cell.repeats)[1] > 0
    assert cell.tokens_per_second == pytest.approx(2e3 / cell.ms)
    assert (cell.first is None) == (task == "single")
    assert cell.first is None or 0 < cell.first < cell.ms * cell.new_tokens
    assert cell.check in ("same", "near")
    assert (cell.share is not None) == cached
    if cached:
        assert cell.share == pytest.approx(cell.bytes / 1e9 / (cell.ms / 1e3))


def test_compiled_cells_are_right(bench):
    compile_model(bench.model, "blocks")
    for block in bench.model.layers:
        block.compile(backend="aot_eager")
    torch.compiler.reset()
    assert {bench.cell(COMPILED, *kind).check for kind in KINDS} <= {"same", "near"}


@pytest.mark.parametrize("mode", [CAPTURED, BOTH], ids=lambda mode: mode.name)
def test_a_captured_cell_needs_a_gpu(bench, mode):
    cell = bench.cell(mode, "single", True)
    assert (cell.ms, cell.note) == (None, "needs a GPU")


def test_a_captured_generation_has_settled(bench, monkeypatch):
    """Generations before those that are measured are as many as a prompt's forward takes to be captured."""
    seen = []
    steady = lambda *args, **how: (seen.append(how["max_new_tokens"]) or bench.expected[1], [len(seen), 0.1])
    monkeypatch.setattr(benchmark, "generate", steady)
    cell = bench._measure(CAPTURED, Cell(CAPTURED.name, "e2e", True, 2, 9, 4), None)
    assert seen == [4, *[2] * (benchmark.COME_OFTEN - 1), *[4] * (1 + bench.repeats)]
    assert (cell.check, cell.first) == ("same", (len(seen) - 1) * 1e3)


def test_a_captured_step_is_replayed_and_checked(bench, monkeypatch):
    monkeypatch.setattr(benchmark, "CapturedStep", Played)
    monkeypatch.setattr(benchmark, "Run", lambda *args, **kwargs: None)  # says that there is no GPU
    empty = Cell(CAPTURED.name, "single", True, 2, 9, 4)
    with torch.inference_mode():
        assert bench._measure(CAPTURED, empty, None).check == "same"
        bench.model.layers[0].attn.query.weight.mul_(-1)
        assert bench._measure(CAPTURED, empty, None).check == "differs after the prompt"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # what the compiler has to say about fp32
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_all_cells_on_a_gpu(capsys, dtype):
    words = ["--architecture", "llama", "--variant", "micro", "--dtype", dtype, "--seq_len", "64"]
    code, out, err = run(capsys, *words, "--max_new_tokens", "20", "--device_type", "cuda", "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert report["machine"]["bandwidth_gb_s"] > 100
    assert len(report["cells"]) == 14
    for cell in report["cells"]:
        assert cell["ms"], cell
        assert cell["reserved"] >= cell["allocated"] > 0
        assert cell["check"] in ("same", "near"), cell


@pytest.mark.parametrize(("task", "cached"), KINDS)
def test_a_wrong_result_is_found(bench, task, cached):
    """Another weight after the reference was made, as if this way to run computed something else."""
    with torch.no_grad():
        bench.model.layers[0].attn.query.weight.mul_(-1)
    cell = bench.cell(EAGER, task, cached)
    assert cell.wrong, cell.check
    assert cell.check.startswith("differs by" if task == "single" else "differs in row ")


def test_a_tie_is_not_wrong(bench):
    want = bench.expected[1]
    logits = bench.model(want[:1, :9], last_n_tokens=1)[:, -1]
    second = logits.topk(2).indices[0, 1]
    other = want.clone()
    other[0, 9] = second
    bench.model.head.weight.data[second] = bench.model.head.weight.data[want[0, 9]]  # now as likely
    assert bench._compare(other) == "near"
    other[0, 9] = logits.argmin()
    assert bench._compare(other) == "differs in row 0 at new token 1"


@pytest.mark.parametrize(("layers", "near"), [(2, 1e-3), (32, 1e-3), (128, 2e-3)])
def test_more_layers_round_more(layers, near):
    bench = Bench(small_model(nlayers=layers), 1, 2, 1, check=False)
    assert bench.near == pytest.approx(near)


def test_not_finite_is_wrong(bench):
    assert bench._compare(torch.full_like(bench.expected[0], float("nan"))).startswith("differs")
    assert bench._compare(torch.full((2,), -1)).startswith("differs")  # what a captured step says of such logits


def test_out_of_memory_is_a_row_and_the_next_cell_runs(bench, monkeypatch):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "generate", short)
        cell = bench.cell(EAGER, "e2e", True)
    assert (cell.ms, cell.note, cell.wrong) == (None, "out of memory", False)
    assert bench.cell(EAGER, "e2e", True).ms


def test_what_does_not_compile_is_a_row_and_wrong(bench):
    def backend(graph, inputs):
        raise NotImplementedError("no such kernel")

    for block in bench.model.layers:
        block.compile(backend=backend)
    torch.compiler.reset()
    cell = bench.cell(COMPILED, "single", True)
    assert (cell.ms, cell.note, cell.wrong) == (None, "does not compile: NotImplementedError: no such kernel", True)


def test_a_fault_is_not_taken_for_too_little_memory(bench, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(benchmark, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        bench.cell(EAGER, "e2e", True)


def test_bytes_that_a_token_reads():
    model = freeze(small_model(tie_heads=False))
    layer = 16 * 32 * 2 + 16 * 16 * 2 + 3 * 16 * 24 + 2 * 16  # query and dense, key and value, feed-forward, norms
    weights = 2 * layer + 16 + 24 * 16  # last norm, head; no embedding
    cache = 2 * 2 * 2 * 8  # layers, k and v, heads, head_dim
    assert measure.step_bytes(model, 3, 10) == 4 * (weights + 3 * 10 * cache)
    assert measure.step_bytes(freeze(small_model(tie_heads=True)), 3, 10) == 4 * (weights + 3 * 10 * cache)


def test_experts_that_a_token_reads():
    model = freeze(small_model("mixtral", "8x7b", num_experts=4, top_k_experts=1))
    expert = 4 * 2 * 3 * 16 * 24  # bytes, of both layers
    one, two, many = (measure.step_bytes(model, rows, 0) for rows in (1, 2, 9))
    assert (two - one, many - one) == (expert, 3 * expert)


def test_a_window_bounds_the_cache():
    model = freeze(small_model("mistral", "7b", sliding_window=8))
    assert measure.step_bytes(model, 1, 40) == measure.step_bytes(model, 1, 8) > measure.step_bytes(model, 1, 7)
    bench = Bench(model, 2, 20, 4)
    assert {bench.cell(EAGER, *kind).check for kind in KINDS} <= {"same", "near"}


def test_bandwidth_is_measured():
    assert measure.read_bandwidth(torch.device("cpu")) > 1e8


def test_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"seq_len=40 and max_new_tokens=20 are 60 tokens, more than the 48"):
        Bench(small_model(), 1, 40, 20)


# Tables


def test_tables():
    cells = [Cell(mode.name, *kind, 2, 16, 3) for mode in MODES for kind in KINDS if mode.has(kind[1])]
    ms = {"eager": 12.0, "captured": 3.0, "eager, plain attention": 18.0}
    cells = [
        replace(c, ms=ms[c.mode], tokens_per_second=2e3 / ms[c.mode])
        if c.mode in ms
        else replace(c, note="out of memory")
        for c in cells
    ]
    cells[0] = replace(cells[0], first=7.25, share=0.51, allocated=1_500_000_000, reserved=2_000_000_000, check="same")
    text = tables(MACHINE, cells)
    assert "| 2 | 16 | eager | 12.00 | 12.00 | 12.00 | 12.00 |" in text
    assert "| 2 | 16 | captured | 3.00 |  | 3.00 |  |" in text
    assert "| 2 | 16 | compiled | out of memory |" in text
    assert "until the first token\n\n| batch | prompt | mode | single token, cached |" in text
    assert "| 2 | 16 | eager | 7.25 |" in text
    assert "| 2 | 16 | eager | 51% |" in text
    assert "| 2 | 16 | eager | 1.50 / 2.00 |" in text
    assert "| 2 | 16 | a CUDA graph | 4.00x |  | 4.00x |  |" in text
    assert "| 2 | 16 | SDPA over plain attention |  | 1.50x |  | 1.50x |" in text
    assert "warm-up" not in text  # nothing to show
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


# The command


def test_the_command_prints_and_writes(capsys, tmp_path):
    file, lines = tmp_path / "cells.json", tmp_path / "cells.csv"
    code, out, err = run(
        capsys, *QUICK, "--seq_len", "8,12", "--batch_size", "1,2", "--json", str(file), "--csv", str(lines)
    )
    assert code == 0
    assert out.startswith("## llama micro, float32\n\n1 x ")
    assert "| 1 | 12 | eager |" in out
    assert "needs a GPU" in out
    assert "[1/32] eager, one token, cached, 1 x 8: " in err
    report = json.loads(file.read_text())
    assert report["machine"]["bandwidth_gb_s"] == 10
    assert len(report["cells"]) == 4 * 8
    assert {(c["batch_size"], c["seq_len"]) for c in report["cells"]} == {(1, 8), (1, 12), (2, 8), (2, 12)}
    assert {c["check"] for c in report["cells"] if c["ms"]} <= {"same", "near"}
    rows = list(csv.DictReader(io.StringIO(lines.read_text())))
    assert [row["mode"] for row in rows] == [c["mode"] for c in report["cells"]]
    assert [row["ms"] for row in rows] == ["" if c["ms"] is None else str(c["ms"]) for c in report["cells"]]


def test_a_run_that_is_ended_keeps_its_cells(capsys, tmp_path, monkeypatch):
    cell, file = Bench.cell, tmp_path / "cells.json"

    def ended(self, mode, task, cached, profile=None):
        if not cached and task == "e2e":
            raise KeyboardInterrupt
        return cell(self, mode, task, cached, profile)

    monkeypatch.setattr(Bench, "cell", ended)
    run(capsys, *QUICK, "--json", str(file))
    assert [(c["task"], c["cached"]) for c in json.loads(file.read_text())["cells"]] == [
        ("single", True),
        ("single", False),
        ("e2e", True),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["cells.json"]


def test_a_name_that_is_a_link_or_a_device(capsys, tmp_path):
    file = tmp_path / "cells.json"
    (tmp_path / "link.json").symlink_to(file)
    quick = [*QUICK, "--skip_e2e_runs", "--skip_nokvcache_runs"]
    run(capsys, *quick, "--json", str(tmp_path / "link.json"), "--csv", "/dev/null")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(file.read_text())["cells"]
    assert not Path("/dev/null").is_file()


def test_json_in_place_of_the_tables(capsys):
    code, out, _ = run(
        capsys, *QUICK, "--json", "-", "--skip_e2e_runs", "--skip_nokvcache_runs", "--skip_correctness_check"
    )
    assert code == 0
    cells = json.loads(out)["cells"]
    assert [(c["mode"], c["task"], c["cached"], c["check"]) for c in cells] == [
        ("eager", "single", True, ""),
        ("captured", "single", True, ""),
    ]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("eager", {"captured"}),
        ("captured", {"eager", "eager, plain attention"}),
        ("plain_attention", {"eager", "captured"}),
    ],
)
def test_skipped_modes(capsys, skip, left):
    _, out, _ = run(capsys, *QUICK, "--json", "-", f"--skip_{skip}_runs")
    assert {c["mode"] for c in json.loads(out)["cells"]} == left


def test_a_wrong_result_is_the_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(Bench, "_compare", lambda self, got: "differs by 3 standard deviations of the logits")
    code, out, _ = run(capsys, *QUICK)
    assert code == 1
    assert "differs by 3" in out


def test_a_timeline(capsys, tmp_path):
    kinds = ["--skip_e2e_runs", "--skip_nokvcache_runs", "--skip_captured_runs"]
    assert run(capsys, *QUICK, *kinds, "--profile", str(tmp_path))[0] == 0
    events = json.loads((tmp_path / "eager-single-cached-b2-s8.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::linear" for event in events)
    assert "Self CPU" in (tmp_path / "eager-single-cached-b2-s8.txt").read_text()


def test_charts(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(capsys, *QUICK, "--seq_len", "8,12", "--plot", str(tmp_path / "charts"))
    assert code == 0
    written = {file.name: file.read_bytes()[:4] for file in (tmp_path / "charts").iterdir()}
    names = ["bytes.png", "cells.png", "latency.png"]  # of a CPU no memory is known
    assert written == dict.fromkeys(names, b"\x89PNG")
    assert "cells.png" in err


def test_charts_of_memory(tmp_path):
    pytest.importorskip("matplotlib")
    from fms.utils.plots import plot

    cells = [Cell("eager", *kind, 2, n, 3, ms=1.0, reserved=n) for n in (8, 16) for kind in KINDS]
    assert [file.name for file in plot(cells, tmp_path)] == ["cells.png", "latency.png", "memory.png"]
    short = [replace(cell, ms=None, note="out of memory") for cell in cells]
    assert len(plot([*cells[:4], *short[4:]], tmp_path)) == 3
    assert plot(short, tmp_path) == []


def test_charts_have_what_was_measured():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    from fms.utils.plots import _bars, _lines, pyplot

    cells = [Cell("eager", *KINDS[0], 2, n, 3, ms=float(n)) for n in (8, 16)]
    cells += [Cell("captured", *KINDS[0], 2, 8, 3, ms=2.0), Cell("captured", *KINDS[0], 2, 16, 3, note="too late")]
    lines, bars = _lines(cells, "ms", 1.0, "ms"), _bars(cells)
    assert len(lines.axes) == 1, "a panel without a line"
    assert lines.axes[0].get_ylim()[1] > 16
    shown = {
        text.get_text(): handle
        for legend in bars.legends
        for text, handle in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    assert {name: handle.get_facecolor() for name, handle in shown.items()} == {
        "eager": to_rgba("C0"),
        "captured": to_rgba("C1"),
    }
    assert [panel.get_xlim() for panel in bars.axes] == [(-0.5, 0.5)] * 2
    pyplot().close("all")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokenizer", "nowhere/tokenizer.model"], "nowhere/tokenizer.model"),
        (["--seq_len", "8,x"], "'x' must be a whole number, at least 1"),
        (["--seq_len", "4000"], "more than the 1024 that this model was made for"),
        (["--json", "-", "--csv", "-"], "would both print"),
        (["--csv", "/nowhere/cells.csv"], "/nowhere/cells.csv: there is no directory /nowhere"),
        (["--bandwidth", "0"], "must be positive"),
        (["--skip_kvcache_runs", "--skip_nokvcache_runs"], "nothing is left to measure"),
        (["--distributed"], "start with torchrun"),
        (["--variant", "7c"], "llama has no variant '7c'"),
        (["--architecture", "roberta", "--variant", "micro"], "an encoder makes no tokens"),
        (["--skip_eagre_runs"], "did you mean '--skip_eager_runs'?"),
    ],
)
def test_errors_are_one_line(capsys, words, said):
    code, out, err = run(capsys, *QUICK, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert [line.startswith("fms: error: ") for line in err.splitlines()][-1]


def test_the_tokenizer_bounds_the_ids(capsys, monkeypatch):
    made = []
    init = Bench.__init__
    monkeypatch.setattr(Bench, "__init__", lambda *a, **k: made.append(a[0]) or init(*a, **k))
    assert run(capsys, *QUICK, "--tokenizer", "char_tokenizer", "--skip_e2e_runs")[0] == 0
    assert made[0].ids.max() < 256


# The script


SEED = ["--architecture=llama", "--variant=micro", "--tokenizer=char_tokenizer", "--batch_size=2", "--seq_len=16"]
SEED += ["--skip_correctness_check"]


def test_the_script_takes_the_words_of_the_existing_one(capsys):
    import runpy

    run_script = runpy.run_path(SCRIPT)["main"]
    more = [
        "--max_new_tokens=2",
        "--skip_compile_runs",
        "--device_type=cpu",
        "--unfuse_weights",
        "--compile_mode=default",
    ]
    assert run_script([*SEED, *more]) == 0
    out, err = capsys.readouterr()
    assert "| 2 | 16 | eager |" in out
    assert "--unfuse_weights has no effect" in err


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_script_with_compiled_runs_on_ranks(size, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"] if size > 1 else []
    words = [*SEED[:-1], "--max_new_tokens=3", "--dtype=fp32", "--bandwidth=10", f"--json={tmp_path / 'cells.json'}"]
    command = [sys.executable, *launcher, SCRIPT, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("### Milliseconds a token") == 1  # one rank speaks
    assert done.stderr.count("[1/14]") == 1
    report = json.loads((tmp_path / "cells.json").read_text())
    assert report["machine"]["ranks"] == size
    assert len(report["cells"]) == 14
    measured = [c for c in report["cells"] if c["ms"]]
    assert len(measured) == 10
    assert {c["check"] for c in measured} <= {"same", "near"}
