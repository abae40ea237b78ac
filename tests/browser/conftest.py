"""Headless Chromium, where the system has one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
READY = "html[data-ready]"
"""What the page's script sets once it has run."""


def installed() -> str | None:
    """Path of the system's Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened() -> Iterator[Browser]:
    """A browser, closed behind."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser; without one the test is reported as not run."""
    if installed() is None:
        pytest.skip("not run: no Chromium")
    with opened() as browser:
        yield browser
