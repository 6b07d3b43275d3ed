"""Who may import whom (docs/architecture.md), and that `import fms.models` stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room and what it may import besides the standard library, ~ only inside functions. The longest fitting path counts.
TABLE = {
    "fms/__init__.py": "",
    "fms/__main__.py": "fms.cli",
    "fms/cli": "fms.__version__ fms.cli ~fms ~fms.models.hf ~torch ~torch.distributed ~tqdm ~lm_eval",
    "fms/models/hf": "torch transformers fms.models fms.models.hf fms.modules fms.utils ~peft",
    "fms/models/__init__.py": "torch fms.models fms.modules fms.utils ~fms.distributed",
    "fms/models/convert.py": "torch fms.models fms.modules fms.utils ~fms.distributed",
    "fms/models": "torch fms.models fms.modules fms.utils",
    "fms/modules": "torch fms.modules fms.kernels",
    "fms/kernels": "torch fms.kernels ~fms.kernels.gpu ~triton",
    "fms/kernels/gpu": "triton fms.kernels.gpu",
    "fms/distributed": "torch torch.distributed fms.distributed fms.kernels fms.modules.tp fms.utils.tp_plan"
    " fms.utils.devices",
    "fms/utils": "torch numpy safetensors fms.utils fms.modules fms.kernels fms.__version__"
    " ~tokenizers ~sentencepiece ~tiktoken ~jinja2 ~huggingface_hub ~tqdm ~matplotlib",
    "fms/datasets": "torch numpy fms.datasets fms.utils ~pyarrow ~datasets ~tqdm",
    "fms/training": "torch torch.distributed fms.training fms.distributed fms.kernels.cross_entropy"
    " fms.kernels.adamw fms.utils ~peft ~tqdm",
}
# `torch` and `fms.models` do not cover these: they must be named.
APART = ("torch.distributed", "fms.models.hf", "fms.kernels.gpu")
HEAVY = ["transformers", "tokenizers", "sentencepiece", "tiktoken", "jinja2", "huggingface_hub", "pyarrow", "triton"]
HEAVY += ["matplotlib", "torch.distributed.tensor", "fms.distributed", "fms.models.hf"]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(path: str, tree: ast.AST, lazy: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether it waits until a function runs), attributes `torch.distributed` included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(Path(path).parts[: -node.level]) if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed", lazy
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        yield from imports(path, node, lazy or typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def violations(path: str, source: str) -> list[str]:
    room = max((room for room in TABLE if path == room or path.startswith((f"{room}/", f"{room}.py"))), key=len)
    allowed = {word.lstrip("~"): word.startswith("~") for word in TABLE[room].split()}
    found = []
    for line, name, lazy in imports(path, ast.parse(source)):
        if name.split(".")[0] in sys.stdlib_module_names:
            continue
        apart = next((prefix for prefix in APART if within(name, prefix)), "")
        rules = [word for word in allowed if within(name, word) and within(word, apart or word)]
        if not rules:
            found.append(f"{path}:{line}: {room} may not import {name}")
        elif allowed[max(rules, key=len)] and not lazy:
            found.append(f"{path}:{line}: {room} may import {name} only inside a function")
    return found


def test_every_import_is_allowed():
    files = sorted(ROOT.glob("fms/**/*.py"))
    found = [fault for file in files for fault in violations(file.relative_to(ROOT).as_posix(), file.read_text())]
    assert files
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("fms/modules/norm.py", "from fms.utils import config", "may not import fms.utils.config"),
        ("fms/modules/norm.py", "from ..utils import config", "may not import fms.utils.config"),
        ("fms/modules/norm.py", "from ..kernels.norm import norm", ""),
        ("fms/modules/norm.py", "def f():\n import torch.distributed as dist", "may not import torch.distributed"),
        ("fms/modules/norm.py", "def f():\n from torch import distributed", "may not import torch.distributed"),
        ("fms/modules/norm.py", "def f():\n torch.distributed.get_rank()", "may not import torch.distributed"),
        ("fms/kernels/norm.py", "import triton.language as tl", "only inside a function"),
        ("fms/kernels/norm.py", "def f():\n import triton.language as tl", ""),
        ("fms/utils/tokenizers/char.py", "if True:\n import sentencepiece", "only inside a function"),
        ("fms/utils/tokenizers/char.py", "if TYPE_CHECKING:\n import sentencepiece", ""),
        ("fms/utils/generation.py", "def f():\n import transformers", "may not import transformers"),
        ("fms/utils/generation.py", "from fms.models.decoder import Decoder", "may not import fms.models.decoder"),
        ("fms/models/__init__.py", "from fms.distributed import strategy", "only inside a function"),
        ("fms/models/llama.py", "def f():\n from fms.distributed import strategy", "may not import fms.distributed"),
        ("fms/models/llama.py", "def f():\n from fms.models.hf import to_hf_api", "may not import fms.models.hf"),
        ("fms/models/hf/api.py", "from transformers import PreTrainedModel\nfrom .config import HFConfig", ""),
        ("fms/distributed/strategy.py", "from fms.modules.attention import Attention", "may not import fms.modules"),
        ("fms/training/loop.py", "from fms.cli import main", "may not import fms.cli"),
        ("fms/cli.py", "import torch", "only inside a function"),
    ],
)
def test_the_table_is_held(path, source, fault):
    found = violations(path, source)
    assert len(found) == bool(fault)
    assert fault in "".join(found)


def test_importing_models_is_light():
    program = "import sys, torch; before = set(sys.modules); import fms.models; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    added = result.stdout.split()
    assert "fms.models" in added
    assert not [name for name in added if any(within(name, heavy) for heavy in HEAVY)]
