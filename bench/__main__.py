"""`python -m bench` is `sparsebench`."""

from bench.cli import main

main()
