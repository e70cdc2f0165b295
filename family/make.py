"""Make a family: initialise all members, report, fine-tune, report again."""

from collections.abc import Sequence

from common.errors import InputError
from family.measure import fine_tune, initialise
from family.plan import Family, FamilyOptions, Member, build_families, build_members
from family.report import write_results
from training.logs import Progress

from tqdm import tqdm


def make_family(options: FamilyOptions, main_options: Sequence[str] = ()) -> None:
    """Write the members within the limits, ``family.csv`` and ``.md``; with accuracies ``family.png`` and ``.html``.

    Args:
        main_options: options of main.py, as on its command line.

    Raises:
        InputError: a file or an option cannot be used, or nothing is within the limits.
    """
    families = build_families(options, main_options)
    made, nearest = initialise_all(families)
    write_results(made, options)
    pairs = [(member, family) for family, members in made.items() for member in members]
    for member, family in tqdm(pairs, desc="fine-tuning the family", disable=None if options.epochs else True):
        if options.epochs and member.record["accuracy_after"] is None:
            fine_tune(member, family)
    write_results(made, options)
    members, evaluated = [member for member, _ in pairs], families[0].evaluated
    print(
        f"{len(members)} Des-Nets: {options.output_dir}/family.csv, family.md" + ", family.png, family.html" * evaluated
    )
    if evaluated:
        print(f"the best that fits: {max(members, key=lambda m: (m.accuracy, -m.params))}")
    else:
        print(f"the largest that fits: {max(members, key=lambda m: m.params)}")
    if nearest is not None:
        print(f"the nearest that does not fit: {nearest}")


def initialise_all(families: Sequence[Family]) -> tuple[dict[Family, list[Member]], Member | None]:
    """The members of each family within the limits, and the member closest to the limits among the others.

    Raises:
        InputError: the folder of a member holds another model, or no member is within the limits.
    """
    grids = {family: build_members(family) for family in families}  # all of them before the first takes time
    made, rejected = {}, []
    for family, grid in grids.items():
        members, too_large = initialise_members(grid, family)
        family.forget_images()
        rejected += too_large
        if members:
            made[family] = members
    nearest = min(rejected, key=lambda member: member.excess(families[0].options), default=None)
    if not made:
        raise InputError(f"nothing fits the limits: the nearest is {nearest}")
    return made, nearest


def initialise_members(grid: Sequence[Member], family: Family) -> tuple[list[Member], list[Member]]:
    """The members of a grid within the limits, initialised, and the others."""
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
    return members, rejected
