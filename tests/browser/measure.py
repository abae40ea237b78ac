"""What a page of 10,000 cells costs: `python -m tests.browser.measure [SEEDS]`, in a minute.

SEEDS is that of a row: 10 gives a table of 1,000 rows, 1 one of 10,000.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from reports.page.build import page
from tests.benchmarks import many
from tests.browser.conftest import READY, opened

# From the click to the frame that shows the new order.
CLICK = """header => new Promise(done => {
  const start = performance.now();
  new MutationObserver((_, observer) => {
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
  }).observe(header.closest("table").tBodies[0], { childList: true });
  header.click();
})"""


def main(seeds: int) -> None:
    """Builds the page, opens it, and prints what took how long."""
    many.SEEDS = seeds
    if seeds == 1:  # as many questions, of which each has but one seed
        many.SPARSITIES = tuple(0.5 + 0.0049 * step for step in range(100))
    with tempfile.TemporaryDirectory() as folder:
        root, path = Path(folder) / "records", Path(folder) / "page.html"
        filled = many.fill(root)
        start = time.perf_counter()
        path.write_text(page(root), encoding="utf-8")
        print(f"cells: {len(filled.specs):,}; page: {path.stat().st_size / 1e6:.1f} MB")
        print(f"built in {time.perf_counter() - start:.1f} s")
        with opened() as browser:
            tab = browser.new_page()
            start = time.perf_counter()
            tab.goto(path.as_uri())
            tab.wait_for_selector(READY)
            print(f"ready in the browser after {time.perf_counter() - start:.1f} s")
            print("rows:", tab.locator(".dt-info").first.inner_text())
            for name in ("top-1 %", "top-1 %", "method", "parameters left"):
                header = tab.locator("thead th", has_text=name).first
                print(f"sort by {name}: {header.evaluate(CLICK):.0f} ms")
            start = time.perf_counter()
            tab.locator("tbody a").first.click()
            tab.wait_for_selector("dialog[open] .plot .main-svg")
            print(f"a cell opened in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else many.SEEDS)
