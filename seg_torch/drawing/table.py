"""Tables in the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; its first column says what a row is about, the others are numbers."""
    # A Text is shown as it is: neither [brackets] nor :colons: mean anything.
    table = Table(title=Text(title))
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    Console().print(table)
