"""Numbers, shares and durations as people read them, in the page, the card and pictures."""

import re

LARGEST = 1e100  # of all numbers that are shown


def number(value: object, decimals: int | None = None) -> str:
    """A number for people: thousands apart, four digits that count unless `decimals` are asked for; else a dash."""
    if not is_finite(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if decimals is not None:
        return f"{value:,.{decimals}f}".replace("-", "−")
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return re.sub(r"e([+-])0*(\d)", lambda match: "e" + match[1].strip("+") + match[2], text).replace("-", "−")


def is_finite(value: object) -> bool:
    """Whether it is a number, and one that can be drawn: beyond `LARGEST` nothing is measured, and axes overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def percent(value: object) -> str:
    """A share between 0 and 1 as a percentage."""
    return "–" if number(value) == "–" else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as people say them, such as "1 h 32 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def count_of_parameters(value: int) -> str:
    """Such as "12.3 million"."""
    if value >= 1_000_000:
        return f"{value / 1e6:.3g} million"
    return number(value)


def joined(values: object) -> str:
    """A list as text; anything else as it is."""
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)
