"""The user's time, as it is written: 10m, 2h or 1h30m."""

import re

from seg_torch.errors import InputError

UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def seconds_of(budget: str | int) -> float:
    """Return the seconds of a budget, such as `90s`, `10m`, `2h` or `1h30m`.

    Raises:
        InputError: It is not written like that, or no time at all.
    """
    text = str(budget).replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not seconds:
        raise InputError(f"budget={budget}: expected a time, such as 90s, 10m, 2h or 1h30m")
    return seconds


def as_time(seconds: float) -> str:
    """Return seconds as people say them: `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
