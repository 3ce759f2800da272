import dataclasses
import re

import pytest

from tunedlens import Evaluation, plots, report
from tunedlens.evaluation import MODEL, Result
from tunedlens.fit import LearningCurve, Look


@pytest.fixture
def evaluation():
    results = []
    for layer in range(8):
        for lens, factor in (("logit", 2.0), ("tuned", 1.0)):
            kl = factor * (8 - layer)
            results.append(Result(lens, layer, "kl_nats", kl, 0.1))
            results.append(Result(lens, layer, "perplexity", 10.0 * 2**kl, 2.0))
    results.append(Result(MODEL, 8, "perplexity", 9.5, 0.5))
    return Evaluation(results, n_layers=8, tokens=100, text_bytes=300, blocks=4)


def lines(figure):
    return {tuple(line.get_ydata()) for line in figure.axes[0].lines}


def test_kl_figure_shows_every_figure_it_was_given(evaluation):
    figure = plots.kl_by_layer(evaluation)
    assert tuple(2.0 * (8 - layer) for layer in range(8)) in lines(figure)
    assert tuple(1.0 * (8 - layer) for layer in range(8)) in lines(figure)
    assert "nats" in figure.axes[0].get_ylabel()


def test_perplexity_figure_is_logarithmic_and_has_the_models_own_line(evaluation):
    figure = plots.perplexity_by_layer(evaluation)
    assert figure.axes[0].get_yscale() == "log"
    assert (9.5, 9.5) in lines(figure)


def test_first_layer_that_dwarfs_the_rest_is_left_out_with_its_figure(evaluation):
    first = Result("logit", 0, "perplexity", 7e11, 1e9)
    results = [first if (r.lens, r.layer, r.metric) == ("logit", 0, "perplexity") else r
               for r in evaluation.results]  # fmt: skip
    figure = plots.perplexity_by_layer(dataclasses.replace(evaluation, results=results))
    assert figure.axes[0].get_ylim()[1] < 1e7
    assert "↑ 7e+11" in {text.get_text() for text in figure.axes[0].texts}


def test_lenses_are_named_beside_their_lines(evaluation):
    texts = {text.get_text() for text in plots.kl_by_layer(evaluation).axes[0].texts}
    assert texts == {"logit lens", "tuned lens"}


def test_figures_are_redrawn_alike_from_saved_results(evaluation, tmp_path):
    plots.draw_evaluation(evaluation, tmp_path / "one")
    again = Evaluation.from_json(evaluation.to_json())
    plots.draw_evaluation(again, tmp_path / "other")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


@pytest.fixture
def curve():
    points = ((0, 3.0, 1.0), (1000, 2.0, 0.5), (4000, 1.5, 0.4))
    return LearningCurve([Look(t // 10, t, t / 100, [a, b]) for t, a, b in points])


def test_learning_curve_shows_every_layer_and_the_mean(curve):
    figure = plots.learning_curve(curve)
    assert lines(figure) == {(3.0, 2.0, 1.5), (1.0, 0.5, 0.4), (2.0, 1.25, 0.95)}
    assert {text.get_text() for text in figure.axes[0].texts} == {"layer 0", "1", "mean"}
    assert "40 s" in figure.axes[0].get_xlabel()


def test_learning_curve_of_a_single_look_is_not_drawn(curve, tmp_path):
    plots.draw_learning_curve(LearningCurve(curve.looks[:1]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_svg_holds_its_labels_as_text(evaluation, tmp_path):
    plots.draw_evaluation(evaluation, tmp_path)
    svg = (tmp_path / "kl_by_layer.svg").read_text()
    assert re.search(r"<text[^>]*>[^<]*tuned lens", svg)


def test_table_gives_every_layer_and_the_mean(evaluation):
    rows = [line.split() for line in report.kl_table(evaluation).splitlines()]
    assert rows[1] == ["0", *["16.00", "±", "0.10", "8.0000", "±", "0.1000"]]
    assert rows[-1] == ["mean", "9.0000", "4.5000"]
