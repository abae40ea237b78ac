"""What people see of a run: a bar with the time left on a terminal, else a line per cell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bench.record import Record, printable
from bench.store import Cell


class View:
    """Writes to stderr; results go to stdout.

    Args:
        cells: those that are about to be trained.
        batch: images of a step.
    """

    def __init__(self, cells: Sequence[Cell], batch: int = 1) -> None:
        self.cells = {cell.spec.key: cell for cell in cells}
        self.done: dict[str, int] = dict.fromkeys(self.cells, 0)
        self.before: dict[str, int] = {}
        self.running: set[str] = set()
        self.said: set[str] = set()
        self.finished = 0
        self.elsewhere = 0
        self.failed = 0
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("steps,"),
                _ImagesColumn(batch),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            total = sum(cell.steps for cell in cells)
            self.bar_task = self.bar.add_task(self._summary(), total=total)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        if self.elsewhere:
            what = f"{self.elsewhere} of the {len(self.cells)} cells"
            print(f"Other runners finished {what}.", file=sys.stderr, flush=True)

    def progress(self, key: str, steps: int) -> None:
        """A cell stands at `steps`; where it first did, no time of this run was spent on."""
        self.before.setdefault(key, steps)
        self.running.add(key)
        self.done[key] = steps
        self._refresh()

    def stop(self, key: str, steps: int) -> None:
        """A cell is saved, and does not go on."""
        self.progress(key, steps)
        self.running.discard(key)
        self._refresh()

    def finish(self, key: str, record: Record) -> None:
        """A cell has its record."""
        self.running.discard(key)
        self.finished += 1
        self.failed += record.status != "ok"
        self.done[key] = self.cells[key].steps
        self._print(
            f"[{self.finished:>{len(str(len(self.cells)))}}/{len(self.cells)}] {line(record)}"
        )
        self._refresh()

    def finish_elsewhere(self, key: str, record: Record) -> None:
        """Another runner has finished a cell: no steps are left, and no time was spent on them."""
        self.running.discard(key)
        self.elsewhere += 1
        self.finished += 1
        self.failed += record.status != "ok"
        steps = self.cells[key].steps
        self.before[key] = steps - self.done[key] + self.before.get(key, 0)
        self.done[key] = steps
        self._refresh()

    def say(self, text: str) -> None:
        """A line that stays; once is enough."""
        if text not in self.said:
            self.said.add(text)
            self._print(text)

    def _print(self, text: str) -> None:
        text = printable(text)  # it may quote whatever a method said
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _refresh(self) -> None:
        if self.bar:
            before = sum(self.before.values())
            self.bar.update(
                self.bar_task,
                total=sum(cell.steps for cell in self.cells.values()) - before,
                completed=sum(self.done.values()) - before,
                description=self._summary(),
            )

    def _summary(self) -> str:
        failed = f", {self.failed} not ok" if self.failed else ""
        return f"{self.finished}/{len(self.cells)} cells, {len(self.running)} running{failed}"


class _ImagesColumn(ProgressColumn):
    """Images a second, of all cells together, and what the time after it is."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        speed = "" if task.speed is None else f"{task.speed * self.batch:,.0f} images/s, "
        return Text(f"{speed}left")


def line(record: Record) -> str:
    """One finished cell in one line."""
    accuracy = "" if record.top1 is None else f"  {record.top1:6.2f} %"
    seconds = f"  {record.times.train_seconds:.1f} s"
    reason = f"  {record.status}: {record.reason}" if record.status != "ok" else ""
    return f"{name(record)}{accuracy}{seconds}{reason}"


def name(cell: Cell | Record) -> str:
    """A cell as people call it."""
    spec = cell.spec
    sparsity = "" if spec.sparsity is None else f" s{spec.sparsity:g}"
    return f"{cell.label} {spec.model}{sparsity} seed{spec.seed} {spec.key}"
