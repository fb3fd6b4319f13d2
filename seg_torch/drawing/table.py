"""Tables in the terminal."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; its first column says what a row is about, the others are numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for cells in rows:
        table.add_row(*map(escape, cells))
    Console().print(table)
