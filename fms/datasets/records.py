"""Reading files of strangers: lines, JSON, and what is done about a record that is not what it should be."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fms.utils.serialization.errors import nearest

MAX_LINE = 8 << 20  # bytes: a longer line is a file of another kind, or a broken one
POLICIES = ("raise", "skip")


class BadRecordError(ValueError):
    """A record that cannot be used: says where it stands (file:line) and what is wrong with it."""


class BadRecords:
    """What becomes of bad records: with "raise" the first one is an error, with "skip" they are counted."""

    def __init__(self, policy: str = "raise") -> None:
        if policy not in POLICIES:
            raise ValueError(
                f"on_bad_record={policy!r} must be one of {', '.join(POLICIES)}{nearest(policy, POLICIES)}"
            )
        self.policy, self.count, self.first = policy, 0, ""

    def report(self, where: str, what: str) -> None:
        """Raises `BadRecordError` unless they are to be skipped."""
        if self.policy == "raise":
            raise BadRecordError(f"{where}: {what} (on_bad_record='skip' passes over such records)")
        self.count += 1
        self.first = self.first or f"{where}: {what}"


def lines(file: Path, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(file:line, the line with its end) of a text file in UTF-8."""
    number = 0
    with file.open("rb") as stream:
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            where = f"{file}:{number}"
            if len(line) > MAX_LINE:
                size = len(line)
                while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE)):
                    size += len(line)
                bad.report(where, f"a line of {size / 1e6:.1f} MB; at most {MAX_LINE / 1e6:.1f} MB are read")
                continue
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                bad.report(where, f"not UTF-8 at byte {error.start + 1} of the line ({error.reason})")
    if not number:
        bad.report(str(file), "the file is empty")


def objects(file: Path, bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of a file of JSON lines, or of one that is a JSON array of objects (`.json`)."""
    for where, value in _array(file, bad) if file.suffix == ".json" else _json_lines(file, bad):
        if isinstance(value, dict):
            yield where, value
        else:
            bad.report(where, f"a JSON object is required, this is {_kind(value)}")


def _json_lines(file: Path, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    for where, line in lines(file, bad):
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            bad.report(where, f"not JSON: {error.msg} at character {error.colno}")
        except RecursionError:
            bad.report(where, "not JSON: nested too deep")


def _array(file: Path, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    text = file.read_bytes()
    if text.lstrip()[:1] == b"{":  # JSON lines under another name
        yield from _json_lines(file, bad)
        return
    if not text.strip():
        bad.report(str(file), "the file is empty")
        return
    try:
        found = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        bad.report(f"{file}:{text.count(10, 0, error.start) + 1}", f"not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        bad.report(f"{file}:{error.lineno}", f"not JSON: {error.msg}")
    except RecursionError:
        bad.report(str(file), "not JSON: nested too deep")
    else:
        if isinstance(found, list):
            yield from ((f"{file}: record {number}", value) for number, value in enumerate(found, 1))
        else:
            bad.report(str(file), f"a JSON array is required, this is {_kind(found)}")


def text_of(record: Mapping[str, Any], field: str) -> str:
    """The text in a field. Raises `ValueError` where it is missing, no text or empty."""
    if field not in record:
        has = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"there is no field {field!r}{nearest(field, record)}; there are {has}")
    if not isinstance(value := record[field], str):
        raise ValueError(f"the field {field!r} must be a text, this is {_kind(value)}")
    if not value.strip():
        raise ValueError(f"the field {field!r} is empty")
    return value


def files(path: str | Path | Iterable[str | Path], suffixes: Iterable[str], pattern: str | None = None) -> list[Path]:
    """The file, those of a list, or those under a folder that fit `pattern` (else: have one of the suffixes), sorted.

    Hidden files are passed over. Raises `ValueError` where there is none.
    """
    suffixes = tuple(suffixes)
    if not isinstance(path, str | Path):
        return [file for one in path for file in files(one, suffixes, pattern)]
    base = Path(path).expanduser()
    if base.is_file():
        return [base]
    if not base.is_dir():
        beside = [p.name for p in base.parent.iterdir()] if base.parent.is_dir() else []
        raise ValueError(f"{base}: there is no such file or folder{nearest(base.name, beside)}")
    found = [
        file
        for file in sorted(base.glob(pattern or "**/*"))
        if file.is_file()
        and (pattern is not None or file.suffix in suffixes)
        and not any(part.startswith(".") for part in file.relative_to(base).parts)
    ]
    if not found:
        raise ValueError(f"{base}: the folder has no file that fits {pattern or ' '.join(f'*{s}' for s in suffixes)}")
    return found


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
