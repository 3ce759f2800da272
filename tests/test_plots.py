import re

import pytest
from conftest import make_evaluation

from tunedlens import Evaluation, plots
from tunedlens.fit import LearningCurve, Look
from tunedlens.metrics import METRICS


@pytest.fixture
def evaluation():
    return make_evaluation()


def lines(axes):
    return {tuple(line.get_ydata()) for line in axes.lines}


def texts(axes):
    return {text.get_text() for text in axes.texts}


@pytest.mark.parametrize("metric", ["kl_nats", "perplexity", "bits_per_byte", "bias_nats"])
def test_figure_by_layer_shows_every_figure_it_was_given(evaluation, metric):
    (axes,) = plots.by_layer(evaluation, metric).axes
    for lens in ("logit", "tuned"):
        assert tuple(e.value for e in evaluation.by_layer(lens, metric)) in lines(axes)
    assert axes.get_ylabel() == METRICS[metric].title


def test_band_is_two_standard_errors_to_either_side(evaluation):
    (axes,) = plots.by_layer(evaluation, "bits_per_byte").axes
    band = axes.collections[0].get_paths()[0].vertices
    value, error = evaluation.by_layer("logit", "bits_per_byte")[3]
    heights = {round(y, 9) for x, y in band if x == 3}
    assert heights == {round(value - 2 * error, 9), round(value + 2 * error, 9)}


def test_perplexity_figure_is_logarithmic_and_has_the_models_own_line(evaluation):
    (axes,) = plots.by_layer(evaluation, "perplexity").axes
    assert axes.get_yscale() == "log"
    assert (9.5, 9.5) in lines(axes)


def test_first_layer_that_dwarfs_the_rest_is_left_out_with_its_figure():
    evaluation = make_evaluation({("logit", 0, "perplexity"): 7e11})
    (axes,) = plots.by_layer(evaluation, "perplexity").axes
    assert axes.get_ylim()[1] < 1e7
    assert "↑ 7e+11" in texts(axes)


def test_lenses_are_named_beside_their_lines(evaluation):
    (axes,) = plots.by_layer(evaluation, "kl_nats").axes
    assert texts(axes) == {"logit", "tuned"}


def test_names_of_lines_that_end_together_do_not_touch():
    evaluation = make_evaluation({("logit", 7, "kl_nats"): 1.0, ("tuned", 7, "kl_nats"): 1.0})
    figure = plots.by_layer(evaluation, "kl_nats")
    figure.draw_without_rendering()
    one, other = (text.get_window_extent() for text in figure.axes[0].texts)
    assert not one.overlaps(other)


def test_prediction_depth_bars_are_the_shares(evaluation):
    (axes,) = plots.prediction_depth(evaluation).axes
    heights = [bar.get_height() for bar in axes.patches]
    shares = [
        e.value
        for lens in ("logit", "tuned")
        for e in evaluation.by_layer(lens, "prediction_depth")
    ]
    assert heights == pytest.approx(shares)


def test_transfer_figure_is_the_matrix_with_its_numbers(evaluation):
    axes, bar = plots.transfer(evaluation).axes
    matrix = evaluation.transfer["tuned"]["kl_nats"].values
    assert axes.images[0].get_array().tolist() == matrix
    assert len(axes.texts) == 64
    assert "nats" in bar.get_ylabel()


def test_position_0_is_a_mark_apart_from_the_line(evaluation):
    axes = plots.by_position(evaluation).axes[0]
    first = evaluation.by_position["logit"]["kl_nats"].values[0][0]
    marks = [line for line in axes.lines if list(line.get_xdata()) == [0]]
    assert [first] in [list(mark.get_ydata()) for mark in marks]
    assert all(min(line.get_xdata()) > 0 for line in axes.lines if line not in marks)


def test_what_was_not_measured_is_not_drawn():
    evaluation = make_evaluation(grids=False)
    there = {name for name, drawing in plots.DRAWINGS.items() if drawing.is_there(evaluation)}
    assert there == plots.DRAWINGS.keys() - {"transfer", "by_position"}


def test_figures_are_drawn_alike_from_saved_results(evaluation):
    again = Evaluation.from_json(evaluation.to_json())
    for name in ("kl_by_layer", "transfer"):
        for kind in plots.KINDS:
            one, other = (
                plots.rendered(plots.DRAWINGS[name].draw(e), kind) for e in (evaluation, again)
            )
            assert one == other


def test_svg_holds_its_labels_as_text(evaluation):
    svg = plots.rendered(plots.by_layer(evaluation, "kl_nats"), "svg").decode()
    assert re.search(r"<text[^>]*>[^<]*tuned", svg)


@pytest.fixture
def curve():
    points = ((0, 3.0, 1.0), (1000, 2.0, 0.5), (4000, 1.5, 0.4))
    return LearningCurve([Look(t // 10, t, t / 100, [a, b]) for t, a, b in points])


def test_learning_curve_shows_every_layer_and_the_mean(curve):
    figure = plots.learning_curve(curve)
    assert lines(figure.axes[0]) == {(3.0, 2.0, 1.5), (1.0, 0.5, 0.4), (2.0, 1.25, 0.95)}
    assert {text.get_text() for text in figure.axes[0].texts} == {"layer 0", "1", "mean"}
    assert "40 s" in figure.axes[0].get_xlabel()


def test_learning_curve_of_a_single_look_is_not_drawn(curve, tmp_path):
    plots.draw_learning_curve(LearningCurve(curve.looks[:1]), tmp_path)
    assert not list(tmp_path.iterdir())
