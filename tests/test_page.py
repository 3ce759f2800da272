"""The pages that we write, in a real browser."""

import csv
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import make_gpt2, random_lens

from tunedlens import FrozenModel, InputError, LogitLens, compare, difference, trajectory
from tunedlens.metrics import TRAJECTORY_METRICS
from tunedlens.report import write_texts
from tunedlens.report.plots.colors import ColorScale, color_table
from tunedlens.tokenizer import shown

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
def open_page(browser, tmp_path):
    """Opens a file; says what it asked for or complained of, itself included."""
    pages = []

    def visit(name):
        page, heard = browser.new_page(), []
        pages.append(page)
        page.on("request", lambda one: one.url.startswith("data:") or heard.append(one.url))
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.goto((tmp_path / name).as_uri())
        return page, heard

    yield visit
    for page in pages:
        page.close()


@pytest.fixture
def opened(open_page, written_report, tmp_path):
    shutil.copytree(written_report, tmp_path, dirs_exist_ok=True)
    return open_page("report.html")


def test_page_asks_for_nothing_and_complains_of_nothing(opened):
    page, heard = opened
    assert heard == [page.url]


def test_pictures_are_drawn(opened):
    page, _ = opened
    widths = page.eval_on_selector_all("img", "images => images.map((i) => i.naturalWidth)")
    assert len(widths) > 5
    assert min(widths) > 100


def test_heading_sorts_by_number_and_back(opened):
    page, _ = opened
    column = "rows => rows.map((row) => parseFloat(row.cells[2].textContent))"
    for is_falling in (False, True):
        page.locator("table").first.locator("th button").nth(2).click()
        found = page.locator("table").first.locator("tbody tr").evaluate_all(column)
        assert found == sorted(found, reverse=is_falling)


def overview(page):
    """The panels of the overview and what the tooltip says."""
    return page.locator("#overview .panel"), page.locator("#tip")


def test_curve_says_its_values_to_a_pointer(opened):
    page, heard = opened
    panels, tip = overview(page)
    box = panels.nth(0).bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.06, box["y"] + box["height"] / 2)
    assert tip.inner_text().splitlines() == [
        "KL(model ‖ lens), nats, layer 0",
        "logit 16.00 ± 0.10",
        "tuned 8.00 ± 0.10",
    ]
    assert page.locator("#overview .dot").count() == 2
    page.mouse.move(5, 5)
    assert not tip.is_visible()
    assert len(heard) == 1


def test_curve_says_its_values_to_a_keyboard(opened):
    page, _ = opened
    panels, tip = overview(page)
    while not panels.nth(1).evaluate("panel => panel === document.activeElement"):
        page.keyboard.press("Tab")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().startswith("perplexity, layer 6\nlogit 160.0 ± 2.0")
    assert "model 9.50 ± 0.50" in panels.nth(1).get_attribute("aria-valuetext")
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_curve_says_its_values_to_a_finger(browser, written_report):
    context = browser.new_context(has_touch=True, viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto((written_report / "report.html").as_uri())
    panels, tip = overview(page)
    panels.nth(0).tap()
    assert "tuned" in tip.inner_text()
    assert tip.bounding_box()["x"] + tip.bounding_box()["width"] <= 390
    page.locator("h1").tap()
    assert not tip.is_visible()
    context.close()


def test_cell_of_a_matrix_says_its_value_to_a_pointer_and_a_keyboard(opened):
    page, heard = opened
    panel, tip = page.locator("#transfer .panel"), page.locator("#tip")
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 1.5 / 8, box["y"] + box["height"] * 4.5 / 8)
    said = "KL(model ‖ lens), nats, translator of layer {} at layer {}\ntuned {}"
    assert tip.inner_text() == said.format(3, 1, "3.0 ± 3.0")
    page.mouse.move(5, 5)
    panel.focus()
    page.keyboard.press("Home")
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert tip.inner_text() == said.format(1, 1, "1.0 ± 1.0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")  # there is none below
    assert tip.inner_text() == said.format(0, 1, "2.0 ± 2.0")
    assert len(heard) == 1


def test_single_matrix_does_not_take_the_width_of_the_page(opened):
    page, _ = opened
    drawn, other = (
        page.locator(f"#{name} img").bounding_box() for name in ("transfer", "overview")
    )
    assert drawn["width"] < 0.6 * other["width"]


def test_position_says_its_values(opened):
    page, _ = opened
    panel, tip = page.locator("#by_position .panel").nth(1), page.locator("#tip")
    panel.focus()
    page.keyboard.press("Home")
    assert tip.inner_text().splitlines() == [
        "KL(model ‖ lens), nats, layer 2, position 0",
        "logit 6.00 ± 0.10",
        "tuned 6.00 ± 0.10",
    ]
    page.keyboard.press("ArrowRight")
    assert "position 1\nlogit 3.00 ± 0.10" in tip.inner_text()


@pytest.mark.parametrize("width", [1280, 375])
def test_page_is_no_wider_than_the_screen(opened, width):
    page, _ = opened
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


TEXT = "import os\n\ndef f(x):\n    return $x$  # </script><script>alert(1)</script> é\n"


@pytest.fixture
def lenses(tiny_many_positions):
    model = tiny_many_positions
    return {"tuned": random_lens(model), "logit": LogitLens.from_model(model)}


@pytest.fixture
def read(tiny_many_positions, lenses):
    return trajectory(tiny_many_positions, lenses, TEXT)


@pytest.fixture
def tiny_many_positions(tokenizer):
    return FrozenModel(make_gpt2(n_positions=64), tokenizer, name="tiny")


@pytest.fixture
def explorer(read, open_page, tmp_path):
    (tmp_path / "explorer.html").write_text(read.to_html())
    return open_page("explorer.html")


def cell(page, row, position):
    return page.locator(f"td[data-row='{row}'][data-position='{position}']")


def test_explorer_asks_for_nothing_and_complains_of_nothing(explorer):
    page, heard = explorer
    cell(page, 1, 3).click()
    page.select_option("#lens", label="tuned − logit")
    for metric in ("rank", "entropy_nats", "logit"):
        page.select_option("#metric", metric)
    assert heard == [page.url.split("#")[0]]


def test_page_that_does_complain_is_heard(explorer):
    page, heard = explorer
    page.evaluate("console.error('that'); fetch('file:///nothing').catch(() => {})")
    assert len(heard) > 1


def test_explorer_says_the_best_token_of_every_cell(explorer, read, tokenizer):
    page, _ = explorer
    best = read.predictions["tuned"].top_ids[..., 0]
    for row, position in ((0, 0), (2, 5), (3, len(read.tokens) - 1)):
        expected = shown(tokenizer, int(best[row, position]))
        assert cell(page, row, position).text_content() == expected
    assert page.locator(".map td").count() == best.numel()


def test_explorer_colours_by_the_figure_and_lens_that_are_chosen(explorer, read):
    page, _ = explorer
    tuned, logit = (read.predictions[name].kl_nats[1, 4].item() for name in ("tuned", "logit"))
    for lens, expected in (("tuned", tuned), ("logit", logit), ("tuned − logit", tuned - logit)):
        page.select_option("#lens", label=lens)
        page.select_option("#metric", "kl_nats")
        found = float(cell(page, 1, 4).get_attribute("data-value"))
        assert found == pytest.approx(expected, abs=2e-4)


def test_explorer_colours_by_the_token_that_is_chosen(tiny_many_positions, open_page, tmp_path):
    read = trajectory(tiny_many_positions, None, TEXT, track=["x"])
    (tmp_path / "explorer.html").write_text(read.to_html())
    page, heard = open_page("explorer.html")
    wanted = str(tiny_many_positions.tokenizer.encode("x")[0])
    for metric, token in (("rank", "final"), ("logit", "x"), ("probability", "x"), ("rank", "x")):
        page.select_option("#metric", metric)
        page.select_option("#token", wanted if token == "x" else token)
        expected = read.values(metric, token=token)[2, 5].item()
        found = float(cell(page, 2, 5).get_attribute("data-value"))
        assert found == pytest.approx(expected, abs=3e-4)
    page.select_option("#token", "next")
    rank = int(read.predictions["logit"].next_ranks[2, 5])
    assert int(cell(page, 2, 5).get_attribute("data-value")) == rank
    end = len(read.tokens) - 1
    assert not cell(page, 2, end).get_attribute("data-value")  # nothing comes next
    cell(page, 1, 2).click()  # not the tracked one
    assert "NaN" not in page.inner_html("#pins")
    assert len(heard) == 1


def test_explorer_has_inputs_below_and_next_tokens_above(explorer, read):
    page, _ = explorer
    heads = page.locator(".map thead th").all_text_contents()
    feet = page.locator(".map tfoot th").all_text_contents()
    inputs = [read.vocabulary[i].shown for i in read.input_ids.tolist()]
    assert feet[1:] == [f"{word}{position}" for position, word in enumerate(inputs)]
    assert heads[1:] == [*inputs[1:], ""]
    assert page.inner_text("h1") == "One text through the layers of tiny"
    right = [label.get_attribute("class") == "right" for label in page.locator("thead th").all()]
    best = read.predictions["tuned"].top_ids[-1, :, 0]
    assert right[1:] == (best == read.next_ids).tolist()


def test_explorer_of_one_token_has_a_scale_whatever_is_chosen(read, open_page, tmp_path):
    (tmp_path / "one.html").write_text(read[:, -1].to_html())
    page, _ = open_page("one.html")
    page.select_option("#metric", "cross_entropy_nats")
    assert page.inner_text("#low") == "0.00"


def test_explorer_shows_the_best_tokens_of_what_is_pointed_at(explorer, read, tokenizer):
    page, _ = explorer
    cell(page, 2, 3).hover()
    lines = page.locator("#tip tr").all_inner_texts()[1:]
    reading = read.predictions["tuned"]
    assert len(lines) == 10
    for place, line in enumerate(lines):
        word, probability, logit, rank = line.split("\t")
        assert word == shown(tokenizer, int(reading.top_ids[2, 3, place]))
        expected = reading.top_log_probs[2, 3, place].exp().item()
        assert float(probability) == pytest.approx(expected, abs=6e-4)
        assert float(logit) == pytest.approx(reading.top_logits[2, 3, place].item(), abs=6e-3)
        assert int(rank) == place + 1


def test_explorer_says_in_words_what_a_cell_is_coloured_by(explorer, read):
    page, _ = explorer
    page.select_option("#metric", "rank")
    cell(page, 1, 3).hover()
    rank = int(read.values("rank", "tuned", token="final")[1, 3])
    assert page.inner_text("#tip .coloured") == (
        f"rank of the model's best token ({read.vocabulary[int(read.final_ids[3])].shown}): {rank}"
    )
    page.select_option("#lens", label="tuned − logit")
    page.select_option("#metric", "kl_nats")
    cell(page, 1, 4).hover()
    one, other = (read.predictions[name].kl_nats[1, 4].item() for name in ("tuned", "logit"))
    expected = f"KL(model ‖ lens), nats: tuned {one:.3f} − logit {other:.3f} = {one - other:.3f}"
    assert page.inner_text("#tip .coloured") == expected


def test_last_token_has_no_cross_entropy(explorer, read):
    page, _ = explorer
    end = len(read.tokens) - 1
    cell(page, 1, end).hover()
    kl, entropy = (
        one[1, end].item() for one in (read.values("kl_nats"), read.values("entropy_nats"))
    )
    assert page.inner_text("#tip").endswith(f"KL {kl:.2f}, entropy {entropy:.2f} nats")
    for lens, metric in (("tuned − logit", "cross_entropy_nats"), ("logit", "probability")):
        page.select_option("#lens", lens)
        page.select_option("#metric", metric)
        if metric == "probability":
            page.select_option("#token", "next")
        cell(page, 2, end).hover()
        assert page.inner_text("#tip .coloured").endswith(": there is no next token")
    cell(page, 2, end - 1).hover()
    assert "no next token" not in page.inner_text("#tip")


def test_difference_is_of_the_models_best_token_unless_another_one_is_chosen(explorer, read):
    page, _ = explorer
    page.select_option("#lens", label="tuned − logit")
    assert page.input_value("#token") == "final"
    page.select_option("#token", "top1")
    cell(page, 1, 3).hover()
    said = page.inner_text("#tip .coloured")
    for name, one in read.predictions.items():
        assert f"{name} {read.vocabulary[int(one.top_ids[1, 3, 0])].shown} " in said


def test_tables_of_two_lenses_are_side_by_side_and_the_tip_has_no_room_to_spare(explorer):
    page, _ = explorer
    widths = []
    for lens in ("tuned", "tuned − logit"):
        page.select_option("#lens", lens)
        cell(page, 1, 3).hover()
        boxes = [table.bounding_box() for table in page.locator("#tip table").all()]
        assert len({box["y"] for box in boxes}) == 1
        widths.append(page.locator("#tip").bounding_box()["width"])
    assert widths[0] < 0.7 * widths[1]


def test_two_texts_have_their_difference_below(tiny_many_positions, lenses, open_page, tmp_path):
    both = compare(tiny_many_positions, lenses, TEXT, baseline_text=TEXT.replace("os", "re"))
    (tmp_path / "two.html").write_text(both.trajectory.to_html(both.baseline))
    page, heard = open_page("two.html")
    page.select_option("#token", "final")
    for metric in ("probability", "entropy_nats"):
        page.select_option("#metric", metric)
        found = page.locator("td[data-text='2'][data-row='1'][data-position='4']")
        expected = both.values(metric, "tuned")[1, 4].item()
        assert float(found.get_attribute("data-value")) == pytest.approx(expected, abs=1e-4)
    page.evaluate("document.querySelector('.map').scrollLeft = 150")
    page.wait_for_function("document.querySelectorAll('.map')[2].scrollLeft === 150")
    assert len(heard) == 1


def test_running_text_has_whole_characters(explorer):
    page, _ = explorer
    assert page.text_content(".running") == TEXT
    page.locator(".running span", has_text="é").click()
    assert page.evaluate("document.activeElement.dataset.position") == str(
        page.locator(".running span", has_text="é").get_attribute("data-at")
    )


def test_tab_reaches_one_cell_and_escape_closes_the_tip(explorer):
    page, _ = explorer
    assert page.locator(".map td[tabindex='0']").count() == 1
    cell(page, 2, 3).hover()
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")


def test_token_is_pinned_by_search(explorer, read):
    page, _ = explorer
    cell(page, 1, 5).focus()
    token = int(read.predictions["logit"].top_ids[0, 5, 7])
    page.fill("#find input", read.vocabulary[token].shown)
    page.keyboard.press("Enter")
    assert page.inner_text("#pins figcaption").startswith(read.vocabulary[token].shown)
    page.fill("#find input", "zebra")
    page.keyboard.press("Enter")
    assert "zebra was not tracked at position 5" in page.inner_text("#said")


def test_token_is_pinned_by_search_within_a_report_of_texts(read, open_page, tmp_path):
    write_texts([read], tmp_path, {}, {})
    page, heard = open_page("report.html")
    frame = page.frame_locator("iframe")
    frame.locator("td[data-row='1'][data-position='5']").focus()
    token = read.vocabulary[int(read.predictions["logit"].top_ids[0, 5, 7])].shown
    frame.locator("#find input").fill(token)
    frame.locator("#find input").press("Enter")
    assert frame.locator("#pins figcaption").inner_text().startswith(token)
    assert len([line for line in heard if "Blocked" in line]) == 0


def test_narrow_screen_does_not_enlarge_a_small_heatmap(read, open_page, tmp_path):
    write_texts([read[:, :2]], tmp_path, {}, {})
    page, _ = open_page("report.html")
    before = page.locator("figure img").first.evaluate("(image) => image.width")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.locator("figure img").first.evaluate("(image) => image.width") <= before


def test_tip_goes_when_something_else_is_chosen(explorer):
    page, _ = explorer
    cell(page, 2, 3).hover()
    page.select_option("#lens", "logit")
    assert not page.is_visible("#tip")


def test_what_is_shown_is_saved_as_csv_and_svg(explorer, read):
    page, _ = explorer
    page.select_option("#metric", "kl_nats")
    with page.expect_download() as csv_file:
        page.click("#csv")
    with page.expect_download() as svg_file:
        page.click("#svg")
    lines = list(csv.DictReader(csv_file.value.path().open(encoding="utf-8", newline="")))
    found = [float(line["tuned/kl_nats"]) for line in lines]
    assert found == pytest.approx(read.predictions["tuned"].kl_nats.flatten().tolist(), abs=1e-4)
    svg = ElementTree.parse(svg_file.value.path())
    assert len(svg.findall(".//{*}rect")) == len(lines)


def test_address_has_layer_and_position(explorer):
    page, _ = explorer
    cell(page, 1, 4).focus()
    page.wait_for_function("location.hash.includes('layer=1&position=4')")
    page.reload()
    assert cell(page, 1, 4).get_attribute("tabindex") == "0"


def test_explorer_is_touched_on_a_phone(browser, read, tmp_path):
    (tmp_path / "phone.html").write_text(read.to_html())
    context = browser.new_context(has_touch=True, viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto((tmp_path / "phone.html").as_uri())
    cell(page, 2, 1).tap()
    assert "probability" in page.inner_text("#tip")
    assert not page.locator("#pins figure").count()
    cell(page, 2, 1).tap()
    assert page.locator("#pins figure").count() == 1
    cell(page, 2, 2).tap()
    page.locator("h1").tap()
    assert not page.is_visible("#tip")
    context.close()


def test_explorer_marks_what_is_pinned_and_follows_its_address(explorer, read):
    page, _ = explorer
    cell(page, 2, 3).click()
    assert "pinned" in cell(page, 2, 3).get_attribute("class")
    token = int(read.predictions["tuned"].top_ids[1, 5, 0])
    page.evaluate(f"location.hash = 'lens=logit&colour=kl_nats&pin=0.5.{token}'")
    page.wait_for_function("document.getElementById('lens').value === 'logit'")
    assert "(position 5)" in page.inner_text("#pins figcaption")
    assert "square-root scale" in page.inner_text("#high")


def test_explorer_follows_a_token_that_is_clicked_until_it_is_clicked_again(explorer, read):
    page, _ = explorer
    cell(page, 1, 6).click()
    token = int(read.predictions["tuned"].top_ids[1, 6, 0])
    place = read.tracked_ids[6].tolist().index(token)
    for name, reading in read.predictions.items():
        points = page.locator(f"path[data-lens={name}]").get_attribute("data-points")
        expected = reading.tracked_log_probs[:, 6, place].exp().tolist()
        assert [float(point) for point in points.split()] == pytest.approx(
            expected, rel=1e-3, abs=1e-6
        )
    cell(page, 1, 6).click()
    assert not page.locator("#pins figure").count()


def test_explorer_is_moved_through_with_the_keyboard(explorer):
    page, _ = explorer
    cell(page, 1, 2).focus()
    for key in ("ArrowUp", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    focused = page.evaluate("({...document.activeElement.dataset})")
    assert (focused["row"], focused["position"]) == ("2", "3")
    assert page.locator("#pins figure").count() == 1


def test_explorer_keeps_what_is_chosen_in_the_address(explorer):
    page, heard = explorer
    page.select_option("#lens", label="tuned − logit")
    page.select_option("#metric", "kl_nats")
    cell(page, 1, 4).click()
    value, curve = cell(page, 1, 4).get_attribute("data-value"), page.inner_html("#pins")
    page.reload()
    assert cell(page, 1, 4).get_attribute("data-value") == value
    assert page.inner_html("#pins") == curve
    page.goto("about:blank")
    page.goto(heard[0] + "#lens=nobody&colour=loss&pin=0.99.1&pin=x")
    assert page.input_value("#lens") == "tuned"
    assert not page.locator("#pins figure").count()


def test_explorer_has_a_second_text_beside_the_first(
    read, tiny_many_positions, lenses, open_page, tmp_path
):
    other = trajectory(tiny_many_positions, lenses, "x = 1\n")
    (tmp_path / "two.html").write_text(read.to_html(other[:, 1:]))
    page, heard = open_page("two.html")
    assert page.locator(".map").count() == 3
    page.select_option("#metric", "entropy_nats")
    found = page.locator("td[data-text='1'][data-row='2'][data-position='0']")
    expected = other.predictions["tuned"].entropy_nats[2, 1].item()
    assert float(found.get_attribute("data-value")) == pytest.approx(expected, abs=2e-4)
    found.click()
    assert "(position 1, text 2)" in page.inner_text("#pins figcaption")
    assert len(heard) == 1
    page.set_viewport_size({"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_texts_that_were_read_with_other_lenses_are_refused(read, tiny_many_positions):
    with pytest.raises(InputError, match="tuned, logit and logit"):
        read.to_html(trajectory(tiny_many_positions, None, "x"))


@pytest.mark.parametrize("width", [1280, 375])
def test_explorer_is_no_wider_than_the_screen_and_keeps_its_headers(explorer, width):
    page, _ = explorer
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    head = page.locator(".map tbody th").first
    before = head.bounding_box()["x"]
    page.evaluate("document.querySelector('.map').scrollLeft = 300")
    assert head.bounding_box()["x"] == before


def test_numbers_and_colours_of_the_page_are_those_of_python(explorer, read):
    page, _ = explorer
    pair = difference(read, "tuned", "logit")
    sides = {"tuned": [read, "tuned"], "logit": [read, "logit"], "tuned − logit": [pair, None]}
    for lens, (data, name) in sides.items():
        page.select_option("#lens", label=lens)
        for metric, about in TRAJECTORY_METRICS.items():
            page.select_option("#metric", metric)
            for token in ("top1", "final", "next") if about.has_token else ("top1",):
                if (metric, token) == ("rank", "top1"):
                    continue
                if about.has_token:
                    page.select_option("#token", token)
                expected = data.values(metric, name, token=token)
                # All lenses have the same colours.
                both = [read.values(metric, one, token=token) for one in read.predictions]
                shared = [expected] if name is None else both
                counted = [(read, one) for one in shared]
                scale = ColorScale.from_values(metric, counted, is_difference=name is None)
                assert_cells_equal(page, expected, scale)


def assert_cells_equal(page, expected, scale):
    found = page.eval_on_selector_all(
        ".map td",
        "cells => cells.map((c) => [c.dataset.row, c.dataset.position, c.dataset.value,"
        " c.style.backgroundColor, c.style.color])",
    )
    table, norm = color_table(scale.color_map), scale.norm()
    assert len(found) == expected.numel()
    for row, position, value, background, ink in found:
        wanted = expected[int(row), int(position)].item()
        if np.isnan(wanted):
            assert value == ""
            continue
        assert float(value) == pytest.approx(wanted, abs=6e-5)
        rgb = "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", background))
        index = int(np.clip(norm(wanted) * len(table), 0, len(table) - 1))
        # A value with four decimals may have the colour beside the exact one.
        assert (rgb, ink) in table[max(index - 1, 0) : index + 2]
