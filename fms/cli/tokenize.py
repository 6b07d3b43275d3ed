"""`fms tokenize`: text into shards of tokens, which a training maps into memory."""

import argparse
import sys
from pathlib import Path

from fms.cli.checkpoints import short
from fms.cli.flags import Parser, add_debug, count, path


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "data", type=path, metavar="IN", help="a file or folder of text (.txt, .text, .md) or JSON lines"
    )
    parser.add_argument("out", type=path, metavar="OUT", help="the directory to write: 00000.arrow and on")
    parser.add_argument(
        "--tokenizer", type=path, required=True, metavar="PATH", help="file, directory, Hub id or char_tokenizer"
    )
    parser.add_argument(
        "--field", default="text", metavar="NAME", help="where JSON lines have the text (default: text)"
    )
    parser.add_argument(
        "--pattern",
        metavar="GLOB",
        help="which files of a folder, as '**/*.py' (default: those with the endings above)",
    )
    parser.add_argument(
        "--shard_tokens", type=count, default=1 << 28, metavar="N", help="tokens of a shard (default: 268435456, 1 GB)"
    )
    parser.add_argument(
        "--on_bad_record",
        choices=["raise", "skip"],
        default="raise",
        help="what a broken line or file does: end it, or be passed over and counted (default: raise)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there (default: an error)")
    add_debug(parser)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fms.datasets import text
    from fms.datasets.arrow import ShardWriter
    from fms.datasets.corpus import keys_of
    from fms.datasets.records import BadRecords, files
    from fms.utils.serialization.writers import writing
    from fms.utils.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(args.tokenizer)
    bad = BadRecords(args.on_bad_record)
    found = files(args.data, (*text.PLAIN, *text.JSON), args.pattern)
    size = sum(file.stat().st_size for file in found)
    made_with = {"tokenizer": Path(args.tokenizer).name, "vocab_size": tokenizer.vocab_size()}
    bar = tqdm(desc="tokenising", total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)
    with writing(args.out, args.overwrite) as directory, bar:
        shards = ShardWriter(directory, args.shard_tokens, made_with)
        for record in text.records(tokenizer, args.data, bad, field=args.field, pattern=args.pattern):
            content = record.text.encode("utf-8", "surrogatepass")
            bar.update(len(content))
            try:
                ids, _ = record.encode()
            except ValueError as error:
                bad.report(record.where, str(error))
            else:
                shards.add(ids, int(keys_of([content])[0]))
        shards.close()
        if not shards.documents:
            raise ValueError(f"{args.data}: there is no document ({bad.count} bad records)")
    if bad.count:
        print(f"bad records passed over: {bad.count}, the first is {bad.first}", file=sys.stderr)
    of = f"{short(shards.tokens)}tokens of {shards.documents} documents"
    print(f"{args.out}: {of} in {shards.shards} shard{'s' * (shards.shards > 1)}")
    return 0
