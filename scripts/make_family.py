#!/usr/bin/env python3
"""A family of Des-Nets from one learngene or more: every size of a grid, written, measured, and fine-tuned if asked.

A grid is of depths × heads, and of MLP ratios if they are given.

scripts/make_family.py --load-gene learngene.safetensors --depths 3-12 --heads 3,6,9,12 --output-dir output/family \\
    --data-set FOLDER --data-path /path/to/images --max-params 30M
scripts/make_family.py … --load-gene lets/learngene.safetensors tleg/learngene.safetensors
scripts/make_family.py … --epochs 5 -- --batch-size 128 --lr 1e-4

Options after -- are passed to main.py. The results of each Des-Net are kept in its folder, in family.json: the same
command resumes where it was stopped. A folder that was made with other options is refused and not overwritten: it may
hold hours of fine-tuning, and models made in different ways cannot be compared in one table.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import console
from common.errors import InputError
from datasets import DATA_SETS
from family.make import make_family
from family.plan import FamilyOptions
from models.vit import MAX_DEPTH
from options import at_least, place, place_or_none, ratios
from training.command_line import Parser, with_dashes


def numbers(text: str) -> list[int]:
    """'3-5,9' as [3, 4, 5, 9]."""
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers and ranges such as 3-6,9,12")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= MAX_DEPTH:
            raise argparse.ArgumentTypeError(f"{part!r} is empty or too large: expected 1 to {MAX_DEPTH}, as in 3-6")
        found.update(range(first, last + 1))
    return sorted(found)


def amount(text: str) -> int:
    """'1.5M' as 1500000."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)([kmg]?)", text.lower())
    value = int(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 500k, 10M or 2.5G")
    return value


def milliseconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: expected a number above 0")
    return value


def parse(argv: Sequence[str]) -> tuple[FamilyOptions, list[str]]:
    """The options of this script, and those after ``--``."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument(
        "--load-gene",
        type=place,
        nargs="+",
        required=True,
        help="learngene file, published checkpoint, address, or name in scripts/learngenes.yaml; several are compared",
    )
    p.add_argument("--depths", type=numbers, required=True, help="numbers of layers, such as 3-12 or 3-6,9,12")
    p.add_argument("--heads", type=numbers, required=True, help="numbers of heads, likewise")
    p.add_argument("--mlp-ratios", type=ratios, help="hidden neurons / width, such as 1,2,4; default: the learngene's")
    p.add_argument(
        "--output-dir", type=place, required=True, help="a folder per Des-Net, and family.csv, .md, .png, .html"
    )
    p.add_argument("--data-set", choices=sorted(DATA_SETS), help="whose test images to evaluate on; default: none")
    p.add_argument("--data-path", type=place_or_none, help="the folder that holds it; not needed for DIGITS")
    p.add_argument("--no-eval", action="store_true", help="only initialise and write (--data-set gives the classes)")
    p.add_argument("--epochs", type=at_least(0), default=0, help="fine-tune each Des-Net with main.py")
    p.add_argument("--max-params", type=amount, help="leave out Des-Nets of more parameters, such as 10M")
    p.add_argument("--max-macs", type=amount, help="leave out Des-Nets of more multiply-accumulates per image")
    p.add_argument("--max-latency-ms", type=milliseconds, help="leave out Des-Nets that take longer for one image")
    p.add_argument("--input-size", type=at_least(1), help="pixels; default: the learngene's")
    p.add_argument("--gene-ema", action="store_true", help="take the averaged weights of a checkpoint")
    p.add_argument("--width-select", help="as in main.py")
    p.add_argument("--head-dim", type=at_least(1), default=64, help="neurons of a head, for published checkpoints")
    end = argv.index("--") if "--" in argv else len(argv)
    args, unknown = p.parse_known_args([with_dashes(argument) for argument in argv[:end]])
    if unknown:
        raise InputError(f"unknown option {unknown[0]}: options of main.py follow after --")
    rest = [with_dashes(argument) for argument in argv[end + 1 :]]
    for option in (argument.partition("=")[0] for argument in rest):
        if option in p._option_string_actions:
            raise InputError(f"{option} belongs before --: it is an option of this script")
    return FamilyOptions(**vars(args)), rest


def main(argv: Sequence[str]) -> int:
    try:
        make_family(*parse(argv))
    except (InputError, OSError) as error:  # an OSError names the file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main(sys.argv[1:]))
