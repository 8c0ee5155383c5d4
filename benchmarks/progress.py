"""A progress bar on stderr for whoever waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Waiting:
    """Shows what is under way, where stderr is a terminal; else one line per task."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Gives the callable that moves the bar by one."""
        if not self._console.is_terminal:
            self._console.print(name, highlight=False)
            yield lambda: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda: progress.advance(task)
