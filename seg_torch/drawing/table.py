"""Tables in the terminal."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True
) -> None:
    """Print a table; its first column says what a row is about, the others are numbers or texts.

    Columns without a value are left out. Where the table is wider than the terminal, each row
    is printed as a list.
    """
    rows = list(rows)
    filled = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    # A Text is shown as it is: neither [brackets] nor :colons: mean anything.
    table = Table(
        title=Text(title) if title else None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for i in filled:
        header_lines = header[i].replace(" ", "\n", 1)
        table.add_column(Text(header_lines), justify="right" if i and numbers else "left")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in filled))
    terminal, file = Console(), Console(width=10_000)
    if not terminal.is_terminal:
        file.print(table)
    elif file.measure(table).maximum <= terminal.width:
        terminal.print(table)
    else:
        for row in rows:
            terminal.print(Text(row[0], style="bold"), soft_wrap=True)
            for i in filled[1:]:
                terminal.print(Text(f"  {header[i]}: {row[i] or '-'}"))
