"""What the commands print: rich tables and progress bars on a terminal, aligned plain text otherwise."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

Cell = str | tuple[str, str]  # text, or text and a rich style, which plain output ignores


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _rich_console(stream):
    """rich's console on a terminal, else None."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return None
    console = RichConsole(file=stream, highlight=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None


class Console:
    """A stream, by default standard output as it is now, and how to write to it."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.rich = _rich_console(self.stream)

    def line(self, *cells: Cell) -> None:
        """The cells side by side, on one line of any length."""
        if self.rich:
            self.rich.print(self._styled(*cells), soft_wrap=True)
        else:
            print("".join(map(_text, cells)), file=self.stream, flush=True)

    @staticmethod
    def _styled(*cells: Cell):
        from rich.text import Text

        return Text.assemble(*cells)  # never parsed as markup: paths hold brackets

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "", figures: bool = True
    ) -> None:
        """Rows under named columns, with `figures` all but the first aligned right. An empty row separates."""
        if self.rich:
            self._rich_table(columns, rows, title, figures)
            return
        lines = [list(columns), *([_text(cell) for cell in row] for row in rows)]
        widths = [max(len(line[i]) for line in lines if line) for i in range(len(columns))]
        lines.insert(1, ["-" * width for width in widths])
        print(f"\n{title}" if title else "", file=self.stream)
        for line in lines:
            cells = zip(line, widths, strict=False)  # a separating line has no cells
            aligned = [
                cell.rjust(width) if i and figures else cell.ljust(width) for i, (cell, width) in enumerate(cells)
            ]
            print("  ".join(aligned).rstrip(), file=self.stream)
        self.stream.flush()

    def _rich_table(self, columns, rows, title, figures) -> None:
        from rich import box
        from rich.table import Table

        table = Table(
            title=title or None,
            title_justify="left",
            title_style="bold",
            collapse_padding=True,
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, column in enumerate(columns):
            figure = figures and i
            table.add_column(column, justify="right" if figure else "left", overflow="fold", no_wrap=not i)
        for row, following in zip(rows, [*rows[1:], ["end"]], strict=True):
            if row:
                table.add_row(*(self._styled(cell) for cell in row), end_section=not following)
        self.rich.print()
        self.rich.print(table)

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields advance(steps done so far, note): a bar on a terminal, else a line for every tenth of the way."""
        if not self.rich:
            yield self._plain_progress(label, total)
            return
        from rich import progress

        columns = (
            progress.TextColumn("  {task.description}"), progress.BarColumn(32), progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"), progress.TimeElapsedColumn(), progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )  # fmt: skip
        with progress.Progress(*columns, console=self.rich, transient=True) as bar:
            task = bar.add_task(label, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)

    def _plain_progress(self, label: str, total: int) -> Callable[[int, str], None]:
        shown = 0

        def advance(done: int, note: str) -> None:
            nonlocal shown
            if done * 10 // total > shown:
                shown = done * 10 // total
                self.line(f"  {label}  {done:>{len(str(total))}}/{total}  {note}")

        return advance
