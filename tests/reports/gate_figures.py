"""Prints how often the gate is wrong, for the table in `reports/README.md`; takes half an hour.

`python -m tests.reports.gate_figures`
"""

from __future__ import annotations

import numpy as np
from tabulate import tabulate

from tests.reports.test_gate_noise import alarms, committed_noise, unequal_alarms

CALLS, FEWER = 10_000, 1_000
"""Checks that are simulated, and of 84 rows."""

SPREAD = np.exp(np.linspace(np.log(0.05), np.log(5.0), 12)).tolist()
TWO_NOISY, HALF_NOISY = [0.1] * 10 + [0.3] * 2, [0.1] * 6 + [0.2] * 6


def rates(sigmas: list[float], calls: int = CALLS) -> list[str]:
    """Percent of checks of noise that exit 1, with 3 seeds and with 5."""
    return [f"{100 * unequal_alarms(sigmas, seeds, calls=calls):.1f} %" for seeds in (3, 5)]


def main() -> None:
    """Simulates and prints."""
    committed = committed_noise()
    lines = [
        ["12 with equal noise", *rates([0.3] * 12)],
        [
            f"{len(committed)} with the noise of the committed `mnist-lenet` records",
            *rates(committed, FEWER),
        ],
        ["12 from 0.05 to 5 points, evenly in the logarithm", *rates(SPREAD)],
        ["10 with sigma 0.1 and 2 with 0.3", *rates(TWO_NOISY)],
        ["6 with sigma 0.1 and 6 with 0.2", *rates(HALF_NOISY)],
    ]
    print(tabulate(lines, headers=["rows", "3 seeds", "5 seeds"], tablefmt="github"))
    found = alarms(3.0, sigma=0.3, calls=CALLS) / CALLS
    print(f"\na drop of 3 sigma in one of 12 rows of equal noise, 5 seeds: {100 * found:.1f} %")
    for drop in (3.0, 4.0):
        found = unequal_alarms(TWO_NOISY, drop=drop, calls=CALLS)
        print(f"of {drop:g} sigma in a calm row of 10 beside 2 noisy ones: {100 * found:.1f} %")


if __name__ == "__main__":
    main()
