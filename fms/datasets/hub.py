"""Data sets of the Hugging Face Hub, through the `datasets` package."""

from collections.abc import Iterator
from pathlib import Path

from fms.datasets.corpus import Record
from fms.datasets.instruction import example
from fms.datasets.records import BadRecords, text_of
from fms.datasets.text import whole
from fms.utils.tokenizers import BaseTokenizer


def records(
    tokenizer: BaseTokenizer,
    path: str | Path,
    bad: BadRecords,
    *,
    name: str | None = None,
    part: str = "train",
    field: str = "text",
) -> Iterator[Record]:
    """`path` is a Hub id (org/name) or a folder that `save_to_disk` wrote; `name` its configuration, `part` its split.

    With columns instruction and output, or messages, these are examples to answer; else `field` is text to continue.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError:
        raise ImportError("data sets of the Hub need datasets: pip install 'foundation-model-stack[data]'") from None
    local = Path(path).expanduser()
    found = load_from_disk(str(local)) if local.is_dir() else load_dataset(str(path), name)
    if isinstance(found, DatasetDict):
        if part not in found:
            raise ValueError(f"{path}: there is no split {part!r}; there are {', '.join(found)} (part=NAME)")
        found = found[part]
    answers = "messages" in found.column_names or {"instruction", "output"} <= set(found.column_names)
    for number, row in enumerate(found, 1):
        where = f"{path}: record {number}"
        try:
            if answers:
                yield example(tokenizer, where, row)
            else:
                text = text_of(row, field)
                yield Record(where, text, whole(tokenizer, text))
        except ValueError as error:
            bad.report(where, str(error))
