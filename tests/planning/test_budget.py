"""A budget is written as people write times."""

import pytest

from seg_torch.errors import InputError
from seg_torch.planning.budget import as_time, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("0.5h", 1800),
        ("1d", 86400),
        ("5M", 300),
    ],
)
def test_budgets_are_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["10", 10, "", "m", "10 minutes", "ten", "-5m", "0m", "5m!", "m5"])
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match="expected a time, such as 90s, 10m, 2h"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 s"), (300, "5 min"), (4000, "67 min"), (12000, "3 h 20 min")],
)
def test_times_are_said_as_people_say_them(seconds, text):
    assert as_time(seconds) == text
