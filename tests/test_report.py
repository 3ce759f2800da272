import csv
import dataclasses
import html
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import make_evaluation
from matplotlib.colors import to_hex

from tunedlens import CorpusConfig, EvaluateConfig, InputError, report
from tunedlens.evaluation import Estimate, Grid
from tunedlens.metrics import METRICS
from tunedlens.report import plots
from tunedlens.report.html import values
from tunedlens.report.html.page import page
from tunedlens.report.origin import origin


@pytest.fixture
def evaluation():
    return make_evaluation()


@pytest.fixture
def folder(written_report, tmp_path):
    return shutil.copytree(written_report, tmp_path / "evaluation")


def test_table_gives_every_layer_and_the_mean(evaluation):
    rows = [line.split() for line in report.kl_table(evaluation).splitlines()]
    assert rows[1] == ["0", *["16.00", "±", "0.10", "8.00", "±", "0.10"]]
    assert rows[-1] == ["mean", *["9.000", "±", "0.050", "4.500", "±", "0.050"]]


def test_summary_says_who_is_best_and_by_how_much(evaluation):
    text = " ".join(report.tables.summary(evaluation))
    assert "tuned 4.500 ± 0.050, logit 9.000 ± 0.050" in text
    assert "The mean KL of tuned is 4.500 ± 0.020 nats lower than that of logit" in text
    assert "by more than two standard errors at every layer" in text
    assert "Mean prediction depth (of 8 layers): tuned 4.00 ± 0.10, logit 5.00 ± 0.10" in text
    assert "a perplexity of 9.50 ± 0.50 and 0.90 ± 0.10 bits per byte" in text


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (1.23456, 0.0123, "1.235 ± 0.012"),
        (2e-5, 1e-6, "0.0000200 ± 0.0000010"),
        (1234.5, 67.8, "1,234 ± 68"),
        (1.5e15, 4e14, "1.50e+15 ± 4e+14"),
        (3.14159, None, "3.1416"),
    ],
)
def test_values_have_as_many_digits_as_their_error_allows(value, error, said):
    assert report.tables.plus_minus(Estimate(value, error)) == said


def test_report_reads_back(evaluation, folder):
    assert report.read_evaluation(folder) == evaluation


def test_csv_has_one_row_for_every_value(evaluation, folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(r.lens, r.metric, r.value) for r in evaluation.results]
    assert [(r["lens"], r["metric"], float(r["value"])) for r in rows] == expected
    with (folder / "transfer.csv").open() as file:
        rows = list(csv.DictReader(file))
    matrix = evaluation.transfer["tuned"]["kl_nats"].values
    assert {(int(r["translator"]), int(r["layer"])): float(r["value"]) for r in rows} == {
        (i, j): matrix[i][j] for i in range(8) for j in range(8)
    }


@pytest.mark.slow
@pytest.mark.renders
def test_report_that_is_written_again_is_the_same(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report.write_report(report.read_evaluation(folder), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_of_an_earlier_report_are_removed(folder):
    assert (folder / "transfer.svg").exists()
    report.write_report(make_evaluation(grids=False), folder)
    assert not list(folder.glob("transfer.*"))
    assert not list(folder.glob("by_position.*"))


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.rows = [], 0

    def handle_starttag(self, tag, attributes):
        self.links += [v for name, v in attributes if name in ("src", "href")]
        self.rows += tag == "tr"


def test_page_needs_no_other_file(evaluation, folder):
    text = (folder / "report.html").read_text()
    parsed = _Page()
    parsed.feed(text)
    assert len(parsed.links) > 5
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert not re.search(r"@import|url\(|fetch\(", text)
    assert parsed.rows > 2 * evaluation.n_layers


def test_page_explains_every_metric_that_it_shows(evaluation):
    text = page(evaluation, {}, {})
    for metric in evaluation.metrics:
        assert html.escape(METRICS[metric].meaning) in text


def test_headings_of_the_page_say_what_their_metrics_mean(evaluation):
    text = page(evaluation, {}, {})
    said = dict(re.findall(r'<th><button title="([^"]+)">([^<]+)</button></th>', text))
    assert said[html.escape(METRICS["bias_nats"].meaning)] == "bias, nats"
    assert len(said) == len(evaluation.metrics) - 1  # the prediction depth has its own table


def test_prediction_depths_have_a_row_for_every_layer_and_their_mean(evaluation):
    _, *rows, (name, *means) = report.tables.depth_rows(evaluation)
    assert [row[0] for row in rows] == [str(layer) for layer in range(9)]
    assert rows[-1][1:] == ["0.200 ± 0.010"] * 2
    assert (name, *means) == ("mean", "5.00 ± 0.10", "4.00 ± 0.10")


def test_page_and_markdown_explain_their_terms(folder):
    markdown, text = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for term in ("layer", "lens", "position", "block", "±", "transfer"):
        assert f"- **{term}:** " in markdown
        assert f"<dt>{term}</dt>" in text
    assert "<dt>transfer</dt>" not in page(make_evaluation(grids=False), {}, {})


def test_origin_is_told_in_words():
    evaluation = make_evaluation()
    evaluation.provenance.update(
        model="gpt2",
        revision="607a30d",
        fingerprint="0123456789abcdef" * 4,
        device="cuda",
        dtype="float32",
        threads=16,
        processes=2,
        created="2026-01-02T03:04:05.678+00:00",
        versions={"python": "3.11.7", "tunedlens": "0.2.0", "torch": "2.13.0"},
        commit="fedcba9876543210fedcba9876543210fedcba98-dirty",
        lenses={
            "tuned": {"folder": "checkpoints/a", "sha256": "89abcdef01234567" * 4},
            "unigram": {"kind": "unigram", "text": {"dataset": "x.txt"}, "tokens_at_most": 10**6},
        },
        corpus={"dataset": "x.txt", "documents": 7, "bytes": 12345, "dropped_tokens": 3},
        config={
            **dataclasses.asdict(EvaluateConfig(by_position=True, batch_size=4)),
            "corpus": dataclasses.asdict(CorpusConfig(dataset="x.txt", seq_len=64, bos=True)),
            "split": "validation",
            "compile": True,  # of another version
        },
    )
    assert origin(evaluation) == {
        "model": "gpt2, revision 607a30d, SHA-256 of final norm and unembedding 0123456789abcdef…",
        "lenses": "tuned: checkpoints/a, SHA-256 89abcdef01234567…; "
        "unigram: from up to 1,000,000 tokens of x.txt",
        "text": "x.txt (held-out part): 7 documents, 12,345 bytes, 3 tokens left over",
        "scored": "100 positions in 4 blocks of 64 tokens",
        "settings that are not the defaults": "BOS before every block, metrics by position, "
        "batch size 4",
        "device": "cuda, float32, 16 threads, 2 processes",
        "software": "tunedlens 0.2.0 (commit fedcba987654 with uncommitted changes), "
        "python 3.11.7, torch 2.13.0",
        "created": "2026-01-02 03:04 UTC",
    }
    assert origin(make_evaluation()) == {"scored": "100 positions in 4 blocks"}


def test_page_and_markdown_tell_the_origin(folder):
    for name in ("report.html", "report.md"):
        assert (
            "100 positions in 4 blocks" in (folder / name).read_text().split("How this report")[1]
        )


def test_page_escapes_what_it_is_told():
    evaluation = make_evaluation()
    evaluation.provenance.update(model="<script>alert(1)</script>", command="a && b < c")
    text = page(evaluation, {}, {})
    assert "<script>alert" not in text
    assert "a &amp;&amp; b &lt; c" in text


@pytest.mark.parametrize("lens", ["logit", "tuned"])
def test_every_value_of_a_curve_is_where_it_is_drawn(evaluation, lens):
    drawing = plots.DRAWINGS["overview"]
    figure = drawing.draw(evaluation)
    width, height = figure.bbox.size
    for axes, metric, panel in zip(
        figure.axes[:3],
        drawing.metrics[:3],
        values.panels("overview", figure, evaluation),
        strict=False,
    ):
        column = evaluation.by_layer(lens, metric)
        drawn = [line for line in axes.lines if len(line.get_xdata()) == 8]
        line = drawn[evaluation.lenses.index(lens)]
        places = axes.transData.transform(line.get_xydata()) / (width, height)
        for layer, (left, bottom) in enumerate(places):
            found = panel["points"][layer]["values"][evaluation.lenses.index(lens)]
            assert found["text"] == report.tables.plus_minus(column[layer])
            if not math.isnan(bottom):
                assert (found["x"], 1 - found["y"]) == pytest.approx((left, bottom), abs=2e-4)


def test_depths_have_their_fractions_and_the_model_its_value(evaluation):
    panels = values.panels("overview", plots.DRAWINGS["overview"].draw(evaluation), evaluation)
    last = panels[3]["points"][-1]
    assert last["name"] == "depth 8"
    assert [value["text"] for value in last["values"]] == ["0.200 ± 0.010"] * 2
    assert panels[1]["points"][0]["values"][-1]["text"] == "9.50 ± 0.50"


def test_positions_have_the_means_that_are_drawn(evaluation):
    rows = [[8.0 - layer, *(float(i) for i in range(1, 131))] for layer in range(8)]
    errors = [[0.1 * i for i in range(131)]] * 8
    evaluation.by_position["tuned"]["kl_nats"] = Grid(rows, errors)
    figure = plots.by_position(evaluation)
    panel = values.panels("by_position", figure, evaluation)[0]
    tuned = [
        (point["name"], value)
        for point in panel["points"]
        for value in point["values"]
        if value["name"] == "tuned"
    ]
    assert [(name, value["text"]) for name, value in tuned[:2]] == [
        ("position 0", "8"),
        ("mean of positions 1 to 3", "2.00 ± 0.20"),
    ]
    line = next(one for one in figure.axes[0].lines if len(one.get_xdata()) == 44)
    places = figure.axes[0].transData.transform(line.get_xydata()) / figure.bbox.size
    found = [(value["x"], 1 - value["y"]) for _, value in tuned[1:]]
    assert found == [pytest.approx(place, abs=2e-4) for place in places]


@pytest.mark.renders
def test_every_cell_of_a_matrix_has_its_value(evaluation):
    figure = plots.transfer(evaluation)
    figure.draw_without_rendering()  # makes the cells square
    (panel,) = values.panels("transfer", figure, evaluation)
    points, columns = panel["points"], panel["columns"]
    image = figure.axes[0].images[0]
    for translator, layer in ((0, 0), (2, 5), (7, 1)):
        point = points[translator * columns + layer]
        assert point["name"] == f"translator of layer {translator} at layer {layer}"
        expected = 1.0 + abs(translator - layer)
        (value,) = point["values"]
        assert value["text"] == report.tables.plus_minus(Estimate(expected, expected))
        place = figure.axes[0].transData.transform((layer, translator)) / figure.bbox.size
        assert (point["x"], 1 - point["y"]) == pytest.approx(tuple(place), abs=2e-4)
        assert value["color"] == to_hex(image.cmap(image.norm(expected)))


def test_folder_with_something_else_is_not_overwritten(folder, tmp_path):
    report.require_own(folder)
    report.require_own(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    report.require_own(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that do not belong to an evaluation"):
        report.require_own(tmp_path / "mine")


def test_damaged_report_is_one_clear_error(folder):
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        report.read_evaluation(folder)
    data = json.loads(text)
    data["results"] = [
        result
        for result in data["results"]
        if (result["lens"], result["layer"], result["metric"]) != ("logit", 3, "top1_agreement")
    ]
    (folder / "metrics.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="top1_agreement of logit has 7 layers"):
        report.read_evaluation(folder)
    (folder / "metrics.json").write_text('{"schema": 1}')
    with pytest.raises(InputError, match="expected an evaluation of schema 2, got 1"):
        report.read_evaluation(folder)
