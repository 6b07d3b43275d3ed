"""`fms models`, `fms convert`, `fms validate`: what there is, in another format, and whether it is whole."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

COUNTS = ("", "k", "M", "B", "T")  # of parameters


def models(args: argparse.Namespace) -> int:
    import torch

    from fms.models import list_models, list_variants
    from fms.models.registry import build
    from fms.utils.serialization.sources import list_sources

    found = []
    for architecture in [args.architecture] if args.architecture else list_models():
        for variant in list_variants(architecture):
            with torch.device("meta"):
                size = sum(p.numel() for p in build(architecture, variant, {}).parameters())
            sources = list_sources(architecture)
            found.append({"architecture": architecture, "variant": variant, "parameters": size, "sources": sources})
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("architecture", "variant", "parameters", "sources")]
    rows += [(m["architecture"], m["variant"], short(m["parameters"], COUNTS), " ".join(m["sources"])) for m in found]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}")
    return 0


def convert(args: argparse.Namespace) -> int:
    from fms.models.convert import convert

    with progress(f"writing {args.out}") as told:
        written = convert(
            args.model_path,
            args.out,
            args.to,
            source=args.source,
            architecture=args.architecture,
            variant=args.variant,
            data_type=args.dtype,
            overwrite=args.overwrite,
            progress=told,
        )
    sizes = [file.stat().st_size for file in Path(written).rglob("*") if file.is_file()]
    print(f"wrote {written}: {len(sizes)} files, {short(sum(sizes))}B in the format {args.to}")
    return 0


def validate(args: argparse.Namespace) -> int:
    from fms.models.convert import validate
    from fms.utils.serialization.checkpoint import open_checkpoint

    given = {"source": args.source, "architecture": args.architecture}
    with progress(f"reading {args.model_path}") as told:
        problems = validate(args.model_path, **given, variant=args.variant, progress=told)
    if problems:
        print("\n".join(problems))
        print(f"{args.model_path}: {len(problems)} problem{'s' * (len(problems) > 1)}")
        return 1
    checkpoint = open_checkpoint(args.model_path, **given)
    size = sum(file.stat().st_size for file in checkpoint.reader.files)
    kind = f"{checkpoint.architecture} in the format {checkpoint.source}"
    print(f"{args.model_path}: ok: {kind}, {len(list(checkpoint.reader.keys()))} tensors, {short(size)}B")
    return 0


@contextmanager
def progress(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told the bytes done and those in all; shown on a terminal only."""
    from tqdm import tqdm

    with tqdm(desc=doing, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield told


def short(number: float, units: tuple[str, ...] = ("", "k", "M", "G", "T")) -> str:
    """With three digits: 1234567 is 1.23 M."""
    unit = 0
    while number >= 999.5 and unit + 1 < len(units):
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {units[unit]}"
