"""Tables in documents, each between marks that say what gives it, so that they can be checked.

<!-- sparsebench report mnist-lenet --records reports/records --by-sparsity -->
what the command prints
<!-- end -->

Paths in a command are relative to the folder in which the check runs, the root of the repository.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError, UsageError
from bench.store import write_atomically
from reports.footnotes import plural

Run = Callable[[Sequence[str]], str]
"""What one of our commands prints, given its words without `sparsebench`."""

DOCUMENTS = tuple(
    Path(name)
    for name in (
        "README.md",
        "reports/README.md",
        "reports/records/README.md",
        "bench/PERFORMANCE.md",
    )
)
"""Where committed tables stand."""

READING = ("compare", "report", "show")
"""Commands that only read, and so may stand in a mark."""

WRITING = ("--check", "--out", "--write")
"""Options of theirs that may not."""

COMMAND, END = re.compile(r"<!-- (sparsebench\b.*) -->"), "<!-- end -->"

FENCE, CODE = re.compile(r" {0,3}(`{3,}|~{3,})"), re.compile(r"`[^`\n]*`")
"""How a block of code begins, and code within a line."""

COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
LIKE_A_MARK = re.compile(r"\bsparsebench\b|\bleaderboard\s*:", re.IGNORECASE)
"""A comment with this is a mark, or an error: what is passed over would never be checked."""


def _leaderboard() -> str:
    from reports.leaderboard import leaderboard

    return leaderboard(Path("reports/records"))


GENERATED: dict[str, Callable[[], str]] = {"leaderboard": _leaderboard}
"""What stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`, of no command's own."""


@dataclass(frozen=True, slots=True)
class Block:
    """A table in a document.

    Attributes:
        start: number of the line with its first mark, from 0; `stop`, with its last.
        name: in `GENERATED`, or the command that prints it.
    """

    start: int
    stop: int
    name: str


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it is, and as the records would have it.

    Attributes:
        blocks: number of its tables.
    """

    path: Path
    text: str
    renewed: str
    blocks: int

    @property
    def difference(self) -> str:
        """A unified diff; empty where nothing differs."""
        lines = difflib.unified_diff(
            self.text.splitlines(),
            self.renewed.splitlines(),
            str(self.path),
            f"{self.path} as the records give it",
            lineterm="",
        )
        return "\n".join(lines)

    def verdict(self, renewed: bool) -> str:
        """The document in a few words; `renewed` says that it was written."""
        tables = plural(self.blocks, "table")
        if not self.difference:
            return f"{tables}, as the records give"
        if renewed:
            return f"{tables}, written"
        return f"not as the records give; to renew: sparsebench report --write {self.path}"


def documents(paths: Sequence[Path], run: Run) -> list[Document]:
    """The documents with tables, every table made anew.

    Args:
        paths: files to look at; none: those of `DOCUMENTS` that exist.
        run: gives what a command prints.

    Raises:
        UsageError: a file cannot be read, a mark is wrong, a table cannot be made, or there is no
            table in a file that was named, or in none of them.
    """
    found = [_document(path, run) for path in paths or filter(Path.exists, DOCUMENTS)]
    empty = [one.path for one in found if not one.blocks]
    if not found or (empty and (paths or len(empty) == len(found))):
        where = ", ".join(map(str, empty or DOCUMENTS))
        raise UsageError(
            f"{where}: no table to check; one stands between the lines "
            f"`<!-- sparsebench report SUITE -->` and `{END}`."
        )
    return [one for one in found if one.blocks]


def write(document: Document) -> None:
    """Writes a document with its tables made anew.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        write_atomically(document.path, document.renewed.encode())
    except OSError as error:
        raise UsageError(f"{document.path}: cannot write it ({error.strerror}).") from error


def _document(path: Path, run: Run) -> Document:
    try:
        text = path.read_bytes().decode("utf-8")  # its ends of lines are kept
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the document ({error}).") from error
    lines = text.split("\n")
    found = list(blocks([line.removesuffix("\r") for line in lines], str(path)))
    for block in reversed(found):  # from below, so that the numbers above stay true
        content = ["", *made(block, str(path), run).strip().split("\n"), ""]
        end = "\r" if lines[block.start].endswith("\r") else ""
        lines[block.start + 1 : block.stop] = [line + end for line in content]
    return Document(path, text, "\n".join(lines), len(found))


def blocks(lines: Sequence[str], where: str) -> Iterator[Block]:
    """The tables of a document. A mark stands alone on its line, without an indent.

    What stands between a table's marks is not looked at, nor is what a reader sees as code.

    Raises:
        UsageError: a mark has no end or is written wrongly; names `where` and the line.
    """
    begun: tuple[int, str, str] | None = None
    fence = ""
    others = [""] * len(lines)
    for number, line in enumerate(lines):
        if begun is not None and line == begun[2]:
            yield Block(begun[0], number, begun[1])
            begun = None
        elif begun is None and (fence or FENCE.match(line)):
            fence = _fence(fence, line)
        elif (mark := _mark(line)) is not None:
            if begun is not None:
                break
            begun = (number, *mark)
        elif begun is None:
            others[number] = line
    if begun is not None:
        raise UsageError(f"{where}:{begun[0] + 1}: this table has no end; expected {begun[2]}.")
    for comment in COMMENT.finditer(CODE.sub("", "\n".join(others))):
        if LIKE_A_MARK.search(comment[0]):
            number = comment.string.count("\n", 0, comment.start()) + 1
            raise UsageError(
                f"{where}:{number}: this looks like a table's mark and is none; one stands alone "
                "on its line, without an indent: `<!-- sparsebench report SUITE -->`, and "
                f"`{END}` at the end."
            )


def _fence(fence: str, line: str) -> str:
    """What ends the block of code that goes on after a line; empty where none does."""
    match = FENCE.match(line)
    if not fence:
        return match[1] if match else ""
    ends = match is not None and match[1].startswith(fence) and line.strip() == match[1]
    return "" if ends else fence


def _mark(line: str) -> tuple[str, str] | None:
    """Name and last mark of the table that a line begins; None where it begins none."""
    if match := COMMAND.fullmatch(line):
        return match[1], END
    for name in GENERATED:
        if line == f"<!-- {name}: begin -->":
            return name, f"<!-- {name}: end -->"
    return None


def made(block: Block, where: str, run: Run) -> str:
    """What belongs between the marks.

    Raises:
        UsageError: the command is not one that only reads, or it fails; names `where`.
    """
    place = f"{where}:{block.start + 1}"
    try:
        if block.name in GENERATED:
            return GENERATED[block.name]()
        return run(_words(block.name))
    except BenchError as error:
        raise UsageError(f"{place}: {error}") from error


def _words(command: str) -> list[str]:
    """The words of a command, which is never given to a shell.

    Raises:
        UsageError: it is not one of `READING`, or one of `WRITING` stands in it.
    """
    try:
        words = shlex.split(command)[1:]
    except ValueError as error:
        raise UsageError(f"{command}: not a command ({error}).") from error
    if not words or words[0] not in READING:
        raise UsageError(f"{command}: not allowed here; allowed are {', '.join(READING)}.")
    if "--help" in words:
        raise UsageError(f"{command}: --help is not allowed here, as it prints no table.")
    if wrong := [word for word in words if word.split("=")[0] in WRITING]:
        raise UsageError(f"{command}: {wrong[0]} is not allowed here, as it does more than print.")
    return words
