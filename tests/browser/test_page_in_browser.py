"""The page in headless Chromium, from a file and without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from reports.page.build import page as build
from tests.browser.conftest import READY
from tests.reports.study import HOSTILE, study


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> str:
    """The page of the study as a file."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "page.html"
    path.write_text(build(study(folder / "records"), "A study"), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def tab(chromium: Browser, address: str) -> Iterator[Page]:
    """The page; at the end nothing may have been fetched, and the console must be empty."""
    tab = chromium.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.wait_for_selector(READY)
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    tab.close()


def column(tab: Page, header: str) -> Locator:
    """The cells of a column of the first table, from above."""
    table = tab.locator("#table-0")
    headers = table.locator("thead th").all_inner_texts()
    place = [text.strip() for text in headers].index(header) + 1
    return table.locator(f"tbody tr td:nth-child({place})")


def sort(tab: Page, header: str) -> None:
    """Clicks on the header of a column of the first table."""
    tab.locator("#table-0 thead th", has_text=header).click()


def overflow(tab: Page) -> int:
    """Pixels by which the page is wider than the window."""
    return tab.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_a_click_on_a_header_sorts_by_value_and_what_was_not_run_stands_last(tab):
    found = ["97.50 ± 0.71", "95.50 ± 0.71", "96.50 ± 0.71", "97.00 ± 0.71", "-"]
    expect(column(tab, "top-1 %")).to_have_text(found)
    sort(tab, "top-1 %")
    expect(column(tab, "top-1 %")).to_have_text(["-", *sorted(found[:4])])
    sort(tab, "top-1 %")
    expect(column(tab, "top-1 %")).to_have_text([*sorted(found[:4], reverse=True), "-"])


def test_the_keyboard_sorts_and_opens_and_closes_a_cell(tab):
    tab.locator("#table-0 thead .dt-column-order").first.focus()
    tab.keyboard.press("Enter")
    tab.keyboard.press("Enter")
    expect(column(tab, "method")).to_have_text(["snip", "set", "set", "rigl", "rigl"])
    tab.locator("#table-0 tbody a").first.focus()
    tab.keyboard.press("Enter")
    expect(tab.locator("#cell")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("#cell")).to_be_hidden()


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        ("method", "set", ["set", "set"]),
        ("sparsity", "98", ["rigl", "set"]),
        ("model", "lenet", ["rigl", "rigl", "set", "set", "snip"]),
    ],
)
def test_a_filter_leaves_the_rows_that_it_names_until_it_is_taken_back(tab, name, value, left):
    tab.locator(f"#filter-{name}").select_option(value)
    expect(column(tab, "method")).to_have_text(left)
    tab.get_by_role("button", name="Show all").click()
    expect(tab.locator("#table-0 tbody tr")).to_have_count(5)


def test_the_filter_of_suites_hides_the_others(tab):
    tab.locator("#filter-suite").select_option("hostile")
    expect(tab.locator("#suite-0")).to_be_hidden()
    expect(tab.locator("#suite-1")).to_be_visible()


def test_a_search_finds_rows_by_any_of_their_texts(tab):
    tab.locator("#suite-0").get_by_role("searchbox").fill("snip")
    expect(column(tab, "method")).to_have_text(["snip"])


@pytest.mark.parametrize("text", ["onerror", "&", "<img"])
def test_a_search_finds_text_that_would_be_markup(tab, text):
    tab.locator("#suite-1").get_by_role("searchbox").fill(text)
    expect(tab.locator("#table-1 tbody a")).to_have_text([HOSTILE])
    tab.locator("#suite-0").get_by_role("searchbox").fill(text)
    expect(tab.locator("#table-0 tbody a")).to_have_count(0)


def test_a_row_opens_its_cell_with_plots_and_links_to_its_other_seeds(tab):
    tab.locator("#table-0 tbody a").nth(1).click()
    cell = tab.locator("#cell")
    expect(cell.locator("h2")).to_have_text("rigl, seed 0")
    expect(cell.locator("pre")).to_have_text(
        re.compile(r"sparsebench run demo\.toml --only rigl-lenet-s0\.98-seed0-\w{12} --records")
    )
    titles = cell.locator("figcaption").all_inner_texts()
    assert titles == ["Loss", "Masks", "Density of the layers"]
    expect(cell.locator(".plot .main-svg").first).to_be_visible()
    expect(cell.get_by_text("95.00 %", exact=True)).to_be_visible()
    cell.locator("summary").click()
    assert cell.locator("table.plain tbody tr").first.locator("td").all_inner_texts() == [
        "fc1.weight",
        "60x10",
        "8",
        "600",
        "0.0133",
    ]
    cell.get_by_role("link", name="seed 1").click()
    expect(cell.locator("h2")).to_have_text("rigl, seed 1")
    expect(cell.get_by_text("96.00 %", exact=True)).to_be_visible()
    cell.get_by_role("button", name="Close").click()
    expect(cell).to_be_hidden()


def test_a_cell_of_several_rounds_shows_each(tab):
    tab.locator("#table-1 tbody a").first.click()
    section = tab.locator("#cell section", has_text="Each round")
    expect(section.locator("tbody tr")).to_have_count(2)  # the page draws it in its own time
    first, last = section.locator("tbody tr").all()
    assert first.locator("td").all_inner_texts() == ["round-0", "50.00", "400", "89.00", "ok"]
    assert last.locator("td").last.inner_text() == f"diverged {HOSTILE}"
    expect(tab.get_by_role("heading", name="Measured in the last round")).to_be_visible()


def test_the_address_of_a_cell_opens_it(tab, chromium):
    tab.locator("#table-0 tbody a").nth(2).click()
    expect(tab.locator("#cell")).to_be_visible()
    other = chromium.new_page()
    other.goto(tab.url)
    expect(other.locator("#cell h2")).to_have_text("set, seed 0")
    other.close()


def test_plots_are_drawn_once_they_are_seen_and_curves_differ_without_colour(tab):
    plot = tab.locator("[data-kind=sparsity]").first
    plot.scroll_into_view_if_needed()
    expect(plot.locator(".scatterlayer .trace")).to_have_count(2)
    shapes = plot.locator(".scatterlayer .trace").evaluate_all(
        "all => all.map(one => one.querySelector('path.point').getAttribute('d'))"
    )
    assert len(set(shapes)) == 2
    assert tab.locator("[data-kind=layer-density] .main-svg").count() == 0
    hidden = tab.locator("section#suite-0 > details", has=tab.locator("[data-kind=layer-density]"))
    hidden.locator("> summary").click()
    expect(hidden.locator(".main-svg").first).to_be_visible()


def test_no_text_of_a_record_runs_or_becomes_markup(tab):
    link = tab.locator("#table-1 tbody a").first
    assert link.inner_text() == HOSTILE
    link.click()
    cell = tab.locator("#cell")
    expect(cell.locator("h2")).to_have_text(f"{HOSTILE}, seed 0")
    expect(cell.locator(".plot .main-svg").first).to_be_visible()
    assert tab.locator("img, #cell script").count() == 0
    assert tab.title() == "A study"


def test_markup_that_came_in_somehow_would_still_not_run(chromium, address):
    tab = chromium.new_page()
    tab.goto(address)
    tab.wait_for_selector(READY)
    with tab.expect_console_message(lambda message: "Content Security Policy" in message.text):
        tab.evaluate("text => { document.querySelector('main').innerHTML = text }", HOSTILE)
    assert tab.title() == "A study"
    tab.close()


def test_on_a_narrow_screen_tables_scroll_in_their_box_and_the_page_does_not(tab):
    tab.set_viewport_size({"width": 360, "height": 740})
    assert overflow(tab) <= 0
    wider = "box => box.scrollWidth > box.clientWidth"
    assert tab.locator("#table-0").locator("xpath=..").evaluate(wider)
    tab.locator("#table-0 tbody a").first.click()
    expect(tab.locator("#cell .plot .main-svg").first).to_be_visible()
    assert overflow(tab) <= 0
    assert not tab.locator("#cell").evaluate(wider)


def test_the_page_follows_the_theme_of_the_system(tab):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(ground)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_selector("html.dark")
    assert tab.evaluate(ground) != light
