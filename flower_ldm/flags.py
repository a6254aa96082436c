"""The traits of a training flag: may a resumed run change it, may the public see it, which numbers are allowed.

`FlagParser.flag` declares a flag together with its traits. A flag that declares none is private, and a resumed run
must not change it.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from .errors import InputError, OneLineParser


@dataclass(frozen=True)
class Bounds:
    """The numbers that a flag allows. The error message reads "--flag must <rule>, got <number>".

    With `is_count`, a whole number counts something, such as images, and must be below 2**31.
    """

    rule: str
    allows: Callable[[float], bool]
    is_count: bool = True


POSITIVE = Bounds("be positive", lambda number: number > 0)
NOT_NEGATIVE = Bounds("not be negative", lambda number: number >= 0)
SHARE = Bounds("be at least 0 and below 1", lambda number: 0 <= number < 1)
SEED = Bounds("be at least 0 and below 2**32", lambda number: 0 <= number < 2**32, is_count=False)  # numpy's limits


def as_it_is(value: object) -> object:
    """The value of `Flag.public` for a flag whose value everybody may see unchanged."""
    return value


@dataclass(frozen=True)
class Flag:
    """The traits of a flag. The defaults apply to a flag that declares none.

    Attributes:
        may_change: a resumed run may have another value. This holds for paths, because `checkpoints.Progress` compares
            the files behind them, and for the batch size, because it compares the images of one update.
        public: returns the form of the value that everybody may see. `None` hides the flag.
        is_read: the flag names something that the run reads, which may be a path on this machine.
        bounds: the allowed numbers. Floats must be finite in any case.
        in_command: the flag belongs to the command that repeats the training. Off for flags that concern one folder's
            history, such as resuming.
        marks_run: every run of every version has the flag, so an `args.yaml` without it is not from a run of ours.
        kind: the kind of its values, as in "must be a number"; `None` if unknown.
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
    """A parser whose flags have traits. `flags` has them by the flag's name in `args.yaml`."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.flags: dict[str, Flag] = {}

    def flag(self, *spellings: str, **declaration) -> None:
        """Declare a flag, with the arguments of `add_argument` and traits of `Flag`."""
        traits = {name: declaration.pop(name) for name in TRAITS & declaration.keys()}
        action = self.add_argument(*spellings, **declaration)
        self.flags[action.dest] = Flag(kind=kind_of_values(action), **traits)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As in argparse, but check the numbers too.

        Raises:
            InputError: argparse refuses the arguments, or a number is not allowed for its flag.
        """
        parsed = super().parse_args(args, namespace)
        for name, flag in self.flags.items():
            check_number(name, getattr(parsed, name), flag.bounds)
        return parsed


def kind_of_values(action: argparse.Action) -> str:
    """The kind of a flag's values, in words."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "yes or no"
    if action.nargs is not None:
        return "a list of names"
    return "a number" if action.type in (int, float) else "a text"


def check_number(name: str, value: object, bounds: Bounds | None) -> None:
    """Raise `InputError` for a number that is not finite or not allowed. Values of other types pass."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} must be a finite number, got {value}")
    if bounds is None or value is None:
        return
    if not bounds.allows(value):
        raise InputError(f"--{name} must {bounds.rule}, got {value}")
    if isinstance(value, int) and bounds.is_count and value >= 2**31:
        raise InputError(f"--{name} must be below 2**31, got {value}")
