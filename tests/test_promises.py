"""docs/reliability.md names tests for each promise; `pytest --promises` lists all of them."""

import re

from conftest import ROOT, promises


def test_every_promise_names_tests_that_carry_its_number():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", text, re.MULTILINE)
    marked = promises()
    assert [int(number) for number, _ in rows] == list(marked)
    for number, tests in rows:
        named = set(re.findall(r"test_\w+", tests))
        found = {name.partition("::")[2] for name in marked[int(number)]}
        assert named, number
        assert named <= found, f"{number}: {named - found} are not marked, or slow"
