"""The tutorial runs as it is, and shows in a browser what is saved in it."""

import re
import shutil
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat")


def kinds(notebook):
    """The MIME types that every cell of code shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [[out for out in cell.outputs if "data" in out] for cell in cells]
    return [[sorted(out.data) for out in outputs] for outputs in shown]


@pytest.mark.slow
def test_tutorial_runs_and_shows_what_is_saved_in_it():
    saved = nbformat.read(TUTORIAL, 4)
    fresh = nbformat.read(TUTORIAL, 4)
    place = {"metadata": {"path": str(TUTORIAL.parent)}}
    nbclient.NotebookClient(fresh, timeout=600, resources=place).execute()
    assert kinds(fresh) == kinds(saved)


def test_notebook_is_small_whole_and_free_of_the_paths_of_a_machine():
    assert TUTORIAL.stat().st_size < 3e6
    cells = [cell for cell in nbformat.read(TUTORIAL, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "error" not in [out.output_type for cell in cells for out in cell.outputs]
    assert not re.search(r"/(root|home|Users|tmp|work)/", TUTORIAL.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_tutorial_as_a_page_shows_pictures_and_a_living_explorer(tmp_path):
    nbconvert = pytest.importorskip("nbconvert", reason="needs nbconvert")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    html, _ = nbconvert.HTMLExporter().from_filename(str(TUTORIAL))
    html = html.replace(
        "</body>", "<iframe" + html.split("<iframe")[1].split("</iframe>")[0] + "</iframe></body>"
    )  # a second explorer on the page
    (tmp_path / "tutorial.html").write_text(html, encoding="utf-8")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.route("http*://**", lambda route: route.abort())
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "tutorial.html").as_uri(), wait_until="domcontentloaded")
        widths = page.eval_on_selector_all("img", "images => images.map((i) => i.naturalWidth)")
        assert len(widths) >= 5
        assert min(widths) > 100
        frames = page.query_selector_all("iframe")
        assert len(frames) == html.count("<iframe") >= 2
        for place in frames:
            place.scroll_into_view_if_needed()  # a frame is read when it is near
            frame = place.content_frame()
            frame.wait_for_selector("td")
            first = frame.locator("body").inner_text()
            frame.locator("select").first.select_option(index=1)
            assert frame.locator("body").inner_text() != first
        browser.close()
    assert [error for error in errors if "srcdoc" in error] == []
