"""Make a family: initialise all members, report, fine-tune, report again."""

from collections.abc import Sequence

from common.errors import InputError
from family.measure import fine_tune, initialise
from family.plan import Family, FamilyOptions, Member, build_family, build_members
from family.report import write_results
from training.logs import Progress

from tqdm import tqdm


def make_family(options: FamilyOptions, main_options: Sequence[str] = ()) -> None:
    """Write the members within the limits, ``family.csv``, ``family.md`` and, with accuracies, ``family.png``.

    Args:
        main_options: options of main.py, as on its command line.

    Raises:
        InputError: a file or an option cannot be used, or nothing is within the limits.
    """
    family = build_family(options, main_options)
    members, nearest = initialise_members(family)
    write_results(members, family)
    for member in tqdm(members, desc="fine-tuning the family", disable=None if options.epochs else True):
        if options.epochs and member.record["accuracy_after"] is None:
            fine_tune(member, family)
    write_results(members, family)
    print(f"{len(members)} Des-Nets: {options.output_dir}/family.csv, family.md" + ", family.png" * family.evaluated)
    if family.evaluated:
        print(f"the best that fits: {max(members, key=lambda m: (m.accuracy, -m.params))}")
    else:
        print(f"the largest that fits: {max(members, key=lambda m: m.params)}")
    if nearest is not None:
        print(f"the nearest that does not fit: {nearest}")


def initialise_members(family: Family) -> tuple[list[Member], Member | None]:
    """The members within the limits, initialised, and the member closest to the limits among the others.

    Raises:
        InputError: no member is within the limits.
    """
    grid = build_members(family)
    rejected = [member for member in grid if member.excess(family.options) > 1]
    members = [member for member in grid if member.excess(family.options) <= 1]
    progress = Progress(len(members), "making the family")
    for member in tuple(members):
        if not initialise(member, family):
            members.remove(member)
            rejected.append(member)
        progress.advance()
        known = {"accuracy": member.accuracy} if member.accuracy is not None else {}
        ratio = {"mlp_ratio": member.arch.mlp_ratio} if member.arch.mlp_ratio is not None else {}
        progress.show({"depth": member.arch.depth, "heads": member.arch.num_heads, **ratio, **known})
    progress.close()
    nearest = min(rejected, key=lambda member: member.excess(family.options), default=None)
    if not members:
        raise InputError(f"nothing fits the limits: the nearest is {nearest}")
    return members, nearest
