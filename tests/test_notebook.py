"""What a notebook shows."""

import re
from html import unescape

import pytest
from conftest import make_evaluation, make_gpt2, random_lens

from tunedlens import FrozenModel, LogitLens, difference, report, trajectory

formatters = pytest.importorskip("IPython.core.formatters", reason="needs IPython")


@pytest.fixture(scope="module")
def read(tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer)
    lenses = {"tuned": random_lens(model), "logit": LogitLens.from_model(model)}
    return trajectory(model, lenses, "import os\n</iframe>")


def shown(value):
    """What a fresh notebook shows, which has no plotting backend."""
    return formatters.DisplayFormatter().format(value)[0]


@pytest.mark.renders
def test_every_figure_is_a_picture_without_a_backend(read):
    for figure in (read.heatmap(), read.curves(), difference(read, "tuned", "logit").heatmap()):
        assert shown(figure)["image/png"].startswith(b"\x89PNG")


def test_explorer_is_framed_with_its_markup_escaped(read):
    html = shown(read)["text/html"]
    frame = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="([^"]*)"[^>]*></iframe>', html)
    page = re.sub("(?<=<head>)<script>[^<]*</script>", "", unescape(frame[1]))
    assert page == read.to_html() == report.explorer(read)
    assert "allow-same-origin" not in frame[2]


@pytest.mark.parametrize("kind", ["evaluation", "top_k", "lens", "model", "trajectory", "page"])
def test_value_is_shown_with_html_and_a_short_repr(kind, read, tiny):
    value = {
        "evaluation": make_evaluation(),
        "top_k": read.top_k(),
        "lens": random_lens(tiny),
        "model": tiny,
        "trajectory": read,
        "page": read.to_html(),
    }[kind]
    found = shown(value)
    assert len(found["text/plain"]) < 150
    assert "<style" not in found["text/html"]  # which would restyle the notebook


def test_top_k_table_has_every_token_escaped(read):
    html = shown(read.top_k(k=3))["text/html"]
    cells = [unescape(cell) for cell in re.findall("<td>(.*?)</td>", html)]
    words = [token.shown for line in read.top_k(k=3).tokens for token in line]
    assert [cell.rpartition(" ")[0] for cell in cells if " " in cell] == words


def test_evaluation_shows_its_overview_and_every_layer():
    html = shown(make_evaluation())["text/html"]
    assert "data:image/svg+xml;base64," in html
    assert html.count("<tr>") == 1 + 8 + 1


def test_page_is_written_where_it_is_asked_for(read, tmp_path):
    page = read.to_html(read, tmp_path / "both.html")
    assert (tmp_path / "both.html").read_text(encoding="utf-8") == page == read.to_html(read)
