"""The report's page in a real browser."""

import shutil

import pytest
from conftest import make_evaluation

from tunedlens import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """The page, and what it asked for or complained of."""
    report.write_report(make_evaluation(), tmp_path)
    page, heard = browser.new_page(), []
    page.on("request", lambda request: heard.append(request.url))
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    address = (tmp_path / "report.html").as_uri()
    page.goto(address)
    yield page, heard, address
    page.close()


def test_page_asks_for_nothing_and_complains_of_nothing(opened):
    _, heard, address = opened
    assert [text for text in heard if not text.startswith("data:")] == [address]


def test_pictures_are_drawn(opened):
    page, *_ = opened
    widths = page.eval_on_selector_all("img", "images => images.map((i) => i.naturalWidth)")
    assert len(widths) > 8
    assert min(widths) > 100


def test_heading_sorts_by_number_and_back(opened):
    page, *_ = opened
    column = "rows => rows.map((row) => parseFloat(row.cells[2].textContent))"
    for is_falling in (False, True):
        page.locator("table").first.locator("th button").nth(2).click()
        found = page.locator("table").first.locator("tbody tr").evaluate_all(column)
        assert found == sorted(found, reverse=is_falling)


@pytest.mark.parametrize("width", [1280, 375])
def test_page_is_no_wider_than_the_screen(opened, width):
    page, *_ = opened
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
