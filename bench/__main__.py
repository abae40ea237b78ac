"""`python -m bench` is `sparsebench`."""

from bench import signals


def main() -> None:
    """Entry point; while the command itself is imported, Ctrl-C ends it without a traceback."""
    with signals.at_once():
        from bench.cli import main as command

    command()


if __name__ == "__main__":
    main()
