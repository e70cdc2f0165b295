"""The part of a study's YAML file that says what its report compares: ``report`` or ``questions``."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from common.errors import InputError

# what a key may hold
NAME, NAMES = "a name", "names in a list"
TEXTS, LISTS = "names with a text each", "names with a list of names each"


@dataclass(frozen=True)
class Report:
    """What is compared with what: names of methods, and of two data sets."""

    learngenes: Sequence[str] = field(metadata={"holds": NAMES})
    scratch: str
    first: str
    linear: str | None = None
    second: str | None = None
    baselines: Sequence[str] = field(default=(), metadata={"holds": NAMES})
    ablations: Sequence[str] = field(default=(), metadata={"holds": NAMES})
    widths: Sequence[str] = field(default=(), metadata={"holds": NAMES})

    @property
    def descended(self) -> list[str]:
        """The methods with a stage 1 whose families are compared."""
        return [*self.learngenes, *([self.linear] if self.linear else [])]

    @property
    def methods(self) -> list[str]:
        """All of them, each once."""
        names = [*self.descended, self.scratch, *self.baselines, *self.ablations, *self.widths]
        return list(dict.fromkeys(names))

    @property
    def data_sets(self) -> list[str]:
        return [name for name in (self.first, self.second) if name]


@dataclass(frozen=True)
class Questions:
    """Four questions about the family of one ViT (`study.questions`): the methods, sizes and data sets that they name.

    Attributes:
        data: the data set of the family.
        sizes: those of the family.
        between: sizes that its stage 1 never sampled.
        family: the method whose members are judged.
        source: method and size of the ViT that the family starts from and that teaches all.
        alone: the same sizes, each distilled from the source alone.
        scratch: the same sizes, on labels alone.
        variants: methods that differ from the family's, and how.
        varied: the one that the variants differ from, if it is not the family itself.
        who: situations of a user, and the methods to choose from.
        second: other data sets.
        held_out: the data of the family with images held out, on which ``scratch`` shows how accuracy grows with the
            epochs, and all other methods are trials of the family's recipe.
    """

    data: str
    sizes: Sequence[str] = field(metadata={"holds": NAMES})
    family: str
    source: Sequence[str] = field(metadata={"holds": NAMES})
    alone: str
    scratch: str
    between: Sequence[str] = field(default=(), metadata={"holds": NAMES})
    variants: Mapping[str, str] = field(default_factory=dict, metadata={"holds": TEXTS})
    varied: str | None = None
    who: Mapping[str, Sequence[str]] = field(default_factory=dict, metadata={"holds": LISTS})
    second: Sequence[str] = field(default=(), metadata={"holds": NAMES})
    held_out: str | None = None

    @property
    def first(self) -> str:
        return self.data

    @property
    def offered(self) -> list[str]:
        """The methods of all situations, each once."""
        return list(dict.fromkeys(method for methods in self.who.values() for method in methods))

    @property
    def methods(self) -> list[str]:
        """All of them, each once."""
        names = [self.family, self.source[0], self.alone, self.scratch, *self.variants, *self.offered]
        names += [self.varied] if self.varied else []
        return list(dict.fromkeys(names))

    @property
    def data_sets(self) -> list[str]:
        return [self.data, *self.second, *([self.held_out] if self.held_out else [])]


PARTS = {"report": Report, "questions": Questions}


def read_compared(
    content: Mapping, methods: Collection[str], sizes: Collection[str], data: Collection[str]
) -> Report | Questions | None:
    """What the report of a study compares; None if the study says nothing of it.

    Args:
        content: what the study's YAML file holds.
        methods: the methods that there are.
        sizes: the sizes that there are.
        data: the data sets that there are.

    Raises:
        InputError: both parts are there; a key is unknown, missing or of the wrong kind, or names a method, a size or
            a data set that there is not.
    """
    there = [part for part in PARTS if part in content]
    if len(there) > 1:
        raise InputError(f"the study has both {' and '.join(there)}: expected one of them")
    if not there:
        return None
    (part,) = there
    check_kinds(content[part], part)
    found = PARTS[part](**content[part])
    check_known(found.methods, methods, f"{part} names the method")
    check_known(found.data_sets, data, f"{part} names the data set")
    if isinstance(found, Questions):
        if len(found.source) != 2:
            raise InputError(f"{part}: source is {found.source!r:.100}: expected a method and a size")
        check_known([*found.sizes, *found.between, found.source[1]], sizes, f"{part} names the size")
    return found


def check_kinds(values: object, part: str) -> None:
    """Raises InputError unless ``values`` has the keys of a part, and each holds what it may."""
    keys = {key.name: key for key in fields(PARTS[part])}
    if not isinstance(values, Mapping):
        raise InputError(f"{part} is {values!r:.100}: expected the names of what to compare, under {', '.join(keys)}")
    for key, value in values.items():
        if key not in keys:
            raise InputError(f"{part} has the unknown key {key!r:.100}: expected {', '.join(keys)}")
        holds = keys[key].metadata.get("holds", NAME)
        if not is_kind(value, holds):
            raise InputError(f"{part}: {key} is {value!r:.100}: expected {holds}")
    for name, key in keys.items():
        needed = key.default == key.default_factory  # both are missing
        if needed and not values.get(name):
            raise InputError(f"{part} has no {name}: expected {key.metadata.get('holds', NAME)}")


def is_kind(value: object, holds: str) -> bool:
    if holds == NAME:
        return isinstance(value, str)
    if holds == NAMES:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    each = NAME if holds == TEXTS else NAMES
    return isinstance(value, dict) and all(isinstance(k, str) and is_kind(v, each) for k, v in value.items())


def check_known(names: Iterable[str], known: Collection[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{what} {name!r:.100}: expected one of {', '.join(sorted(known))}")
