"""Formats numbers, percentages and durations for people."""

import re

LARGEST = 1e100  # the largest number that is shown


def number(value: object, decimals: int | None = None) -> str:
    """A number with thousands separators and four significant digits, or `decimals`; a dash for anything else."""
    if not is_finite(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if decimals is not None:
        return f"{value:,.{decimals}f}".replace("-", "−")
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d)", lambda match: "e" + match[1].strip("+") + match[2], text).replace("-", "−")


def is_finite(value: object) -> bool:
    """Whether the value is a number that can be drawn. Beyond `LARGEST`, plots overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def percent(value: object) -> str:
    """A share between 0 and 1 as a percentage, such as "12.3 %"; a dash for anything else."""
    return "–" if number(value) == "–" else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """A duration in words, such as "1 h 32 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def count_of_parameters(value: int) -> str:
    """A count of parameters in words, such as "12.3 million"."""
    if value >= 1_000_000:
        return f"{value / 1e6:.3g} million"
    return number(value)


def joined(values: object) -> str:
    """A list as text with commas; any other value as its own text."""
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)
