"""`fms plan`: how a model is split over ranks."""

import argparse


def plan(args: argparse.Namespace) -> int:
    import torch

    from fms.models.registry import build
    from fms.utils.devices import dtype_of
    from fms.utils.tp_plan import collectives, pad_model, plan_for, table

    if args.tp < 1:
        raise ValueError(f"--tp {args.tp} must be at least 1")
    dtype = dtype_of(args.dtype) or torch.bfloat16
    with torch.device("meta"):
        model = build(args.architecture, args.variant, {})
    for line in pad_model(model, args.tp):
        print(f"padded with zeros, for inference only: {line}")
    words = plan_for(model, args.tp)
    rows = table(model, words, args.tp, dtype.itemsize)
    width = max(len(row.name) for row in rows)
    print(f"{'parameter':{width}}  {'word':9}  {'shape on a rank':20}  {'layers':>6}  {'MB a rank':>10}")
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        print(f"{row.name:{width}}  {row.word:9}  {shape:20}  {row.layers:>6}  {row.bytes / 1e6:>10,.1f}")
    total = sum(row.bytes for row in rows)
    print(f"{total / 1e9:.2f} GB a rank in {args.dtype}; {collectives(words)} all-reduces a forward")
    return 0
