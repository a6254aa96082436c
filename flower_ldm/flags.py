"""A flag of a training run and its traits: what a resumed run may change, who may see it, which numbers it takes.

Traits are declared with the flag, by `FlagParser.flag`. A flag without traits is private, and a resumed run must not
change it. The data's flags are declared in `data`, all others in `recipes`.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from .errors import InputError, OneLineParser


@dataclass(frozen=True)
class Bounds:
    """Which numbers a flag takes. A refusal reads "--flag must <rule>, got <number>".

    Whole numbers count something, such as images, unless `is_count` is off. Counts must be below 2**31.
    """

    rule: str
    allows: Callable[[float], bool]
    is_count: bool = True


POSITIVE = Bounds("be positive", lambda number: number > 0)
NOT_NEGATIVE = Bounds("not be negative", lambda number: number >= 0)
SHARE = Bounds("be at least 0 and below 1", lambda number: 0 <= number < 1)
SEED = Bounds("be at least 0 and below 2**32", lambda number: 0 <= number < 2**32, is_count=False)  # numpy's bounds


def as_it_is(value: object) -> object:
    """For `Flag.public`: everybody may see the value."""
    return value


@dataclass(frozen=True)
class Flag:
    """The traits of a flag. The defaults are those of a flag that declares none.

    Attributes:
        may_change: a resumed run may have another value. Paths may, since what they lead to is compared instead
            (`checkpoints.Progress`); so may the batch, since the images of one update are.
        public: gives what everybody may see of a value; `None` where nobody may see anything.
        is_read: it names something that the run reads, and that may lie on this disk.
        bounds: the numbers that it takes. Numbers with a fraction must be finite in any case.
        in_command: it belongs to the command that trains the run again, not to the history of one folder.
        marks_run: an `args.yaml` without it is not from a run of ours. Runs of all versions must have it.
        kind: what its values are, as in "must be a number"; `None` where that is not known.
    """

    may_change: bool = False
    public: Callable[[object], object] | None = None
    is_read: bool = False
    bounds: Bounds | None = None
    in_command: bool = True
    marks_run: bool = False
    kind: str | None = None


TRAITS = {field.name for field in fields(Flag)} - {"kind"}


class FlagParser(OneLineParser):
    """A parser whose flags have traits, in `flags` by the name that a flag has in `args.yaml`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flags: dict[str, Flag] = {}

    def flag(self, *spellings: str, **declaration) -> None:
        """Declare a flag: the arguments of `add_argument`, and traits of `Flag`."""
        traits = {name: declaration.pop(name) for name in TRAITS & declaration.keys()}
        action = self.add_argument(*spellings, **declaration)
        self.flags[action.dest] = Flag(kind=kind_of_values(action), **traits)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As in argparse.

        Raises:
            InputError: also for a number out of a flag's bounds.
        """
        parsed = super().parse_args(args, namespace)
        for name, flag in self.flags.items():
            check_number(name, getattr(parsed, name), flag.bounds)
        return parsed


def kind_of_values(action: argparse.Action) -> str:
    """What the values of a flag are, in words."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "yes or no"
    if action.nargs is not None:
        return "a list of names"
    return "a number" if action.type in (int, float) else "a text"


def check_number(name: str, value: object, bounds: Bounds | None) -> None:
    """Refuse a number that is not finite or out of its flag's bounds; what is no number passes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} must be a finite number, got {value}")
    if bounds is None or value is None:
        return
    if not bounds.allows(value):
        raise InputError(f"--{name} must {bounds.rule}, got {value}")
    if isinstance(value, int) and bounds.is_count and value >= 2**31:
        raise InputError(f"--{name} must be below 2**31, got {value}")
