#!/usr/bin/env python3
"""Convert a published learngene to this project's file format, and back.

The suffix of the target gives the format: .safetensors is this project's, .pth the published one. Tensors are written
in float32, with --half in float16; recorded options are kept as far as they are plain data.

scripts/convert_learngene.py published_checkpoint.pth learngene.safetensors
scripts/convert_learngene.py output/lets/learngene.safetensors for_the_authors_code.pth
scripts/convert_learngene.py output/lets/learngene.safetensors half_as_large.safetensors --half
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from models.learngene import save_published
from options import local_path, place

import torch


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "source", type=place, help="learngene file, checkpoint of this program, published checkpoint, or address"
    )
    p.add_argument("target", type=local_path, help="the file to write, .safetensors or .pth")
    p.add_argument("--head-dim", type=int, default=64, help="neurons of a head, which published files do not state")
    p.add_argument("--gene-ema", action="store_true", help="take the averaged weights of a checkpoint")
    p.add_argument("--half", action="store_true", help="write float16 to .safetensors: half the bytes")
    args = p.parse_args(argv)
    try:
        if args.target.suffix not in (".safetensors", ".pth"):
            raise models.InputError(f"{args.target} ends in {args.target.suffix!r}: expected .safetensors or .pth")
        if args.half and args.target.suffix == ".pth":
            raise models.InputError(f"--half is for .safetensors: {args.target} is for programs that expect float32")
        if not args.target.parent.is_dir():
            raise models.InputError(f"{args.target.parent} is no folder: expected one to write {args.target.name} into")
        gene = models.load_learngene(args.source, head_dim=args.head_dim, use_ema=args.gene_ema)
        print(f"{args.source}: {gene}")
        if args.target.suffix == ".pth":
            save_published(gene, args.target)
        else:
            gene.save(args.target, torch.float16 if args.half else torch.float32)
        print(f"{args.target}: {models.load_learngene(args.target, head_dim=gene.arch.head_dim)}")
    except (models.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main(sys.argv[1:]))
