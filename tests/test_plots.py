import itertools
import re

import numpy as np
import pytest
import torch
from conftest import make_evaluation, random_lens
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import TextPath

from tunedlens import Evaluation, InputError, LogitLens, compare, difference, trajectory
from tunedlens.fit import ValidationResult
from tunedlens.metrics import METRICS
from tunedlens.report import plots
from tunedlens.report.plots import style
from tunedlens.tokenizer import shown

pytestmark = pytest.mark.renders


@pytest.fixture
def evaluation():
    return make_evaluation()


def lines(axes):
    return {tuple(line.get_ydata()) for line in axes.lines}


def texts(axes):
    return {text.get_text() for text in axes.texts}


@pytest.mark.parametrize("metric", ["kl_nats", "perplexity", "bits_per_byte", "bias_nats"])
def test_plot_by_layer_shows_every_value_it_was_given(evaluation, metric):
    (axes,) = plots.by_layer(evaluation, [metric]).axes
    for lens in ("logit", "tuned"):
        assert tuple(e.value for e in evaluation.by_layer(lens, metric)) in lines(axes)
    assert axes.get_ylabel() == METRICS[metric].title


def test_band_is_two_standard_errors_to_either_side(evaluation):
    (axes,) = plots.by_layer(evaluation, ["bits_per_byte"]).axes
    band = axes.collections[0].get_paths()[0].vertices
    value, error = evaluation.by_layer("logit", "bits_per_byte")[3]
    heights = {round(y, 9) for x, y in band if x == 3}
    assert heights == {round(value - 2 * error, 9), round(value + 2 * error, 9)}


def test_perplexity_plot_is_logarithmic_and_has_a_line_for_the_model(evaluation):
    (axes,) = plots.by_layer(evaluation, ["perplexity"]).axes
    assert axes.get_yscale() == "log"
    assert (9.5, 9.5) in lines(axes)


def test_first_layer_that_dwarfs_the_rest_is_written_instead_of_drawn():
    evaluation = make_evaluation({("logit", 0, "perplexity"): 7e11})
    (axes,) = plots.by_layer(evaluation, ["perplexity"]).axes
    assert axes.get_ylim()[1] < 1e7
    assert "↑ 7e+11" in texts(axes)


def test_first_layers_that_are_left_out_are_written_below_each_other():
    changed = {(lens, 0, "perplexity"): 7e11 for lens in ("logit", "tuned")}
    figure = plots.by_layer(make_evaluation(changed), ["perplexity"])
    figure.draw_without_rendering()
    one, other = (t.get_window_extent() for t in figure.axes[0].texts if "↑" in t.get_text())
    assert not one.overlaps(other)


def test_lenses_are_named_beside_their_lines(evaluation):
    (axes,) = plots.by_layer(evaluation, ["kl_nats"]).axes
    assert texts(axes) == {"logit", "tuned"}


def test_names_of_lines_that_end_together_do_not_touch():
    evaluation = make_evaluation({("logit", 7, "kl_nats"): 1.0, ("tuned", 7, "kl_nats"): 1.0})
    figure = plots.by_layer(evaluation, ["kl_nats"])
    figure.draw_without_rendering()
    one, other = (Text.get_window_extent(text) for text in figure.axes[0].texts)  # no leaders
    assert not one.overlaps(other)


def test_names_move_as_little_as_they_can():
    rng = np.random.default_rng(0)
    for _ in range(20):
        heights = np.sort(rng.uniform(0, 30, 6))[::-1]
        placed = np.array(style._apart(heights, 10, 0, 60))
        assert (placed[:-1] - placed[1:] >= 10 - 1e-9).all()
        assert placed.min() >= 0
        assert placed.max() <= 60
        for _ in range(200):  # no other allowed place is nearer
            other = np.cumsum(rng.uniform(10, 14, 6))[::-1] - rng.uniform(0, 10)
            if other.min() >= 0 and other.max() <= 60:
                assert ((other - heights) ** 2).sum() >= ((placed - heights) ** 2).sum()


def test_prediction_depth_bars_are_the_shares(evaluation):
    (axes,) = plots.by_layer(evaluation, ["prediction_depth"]).axes
    heights = [bar.get_height() for bar in axes.patches]
    shares = [
        e.value
        for lens in ("logit", "tuned")
        for e in evaluation.by_layer(lens, "prediction_depth")
    ]
    assert heights == pytest.approx(shares)


def test_transfer_plot_is_the_matrix_with_its_numbers(evaluation):
    axes, bar = plots.transfer(evaluation).axes
    matrix = evaluation.transfer["tuned"]["kl_nats"].values
    assert axes.images[0].get_array().tolist() == matrix
    assert len(axes.texts) == 64
    assert "nats" in bar.get_ylabel()


def test_transfer_plot_leaves_out_layers_without_a_translator(evaluation):
    grid = evaluation.transfer["tuned"]["kl_nats"]
    for i, j in itertools.product(range(8), repeat=2):
        if {i, j} - {0, 3, 7}:
            grid.values[i][j] = None
    axes, _ = plots.transfer(evaluation).axes
    shown = axes.images[0].get_array()
    assert shown.tolist() == [[grid.values[i][j] for j in (0, 3, 7)] for i in (0, 3, 7)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3", "7"]


def test_position_0_is_a_mark_apart_from_the_line(evaluation):
    axes = plots.by_position(evaluation).axes[0]
    first = evaluation.by_position["logit"]["kl_nats"].values[0][0]
    marks = [line for line in axes.lines if list(line.get_xdata()) == [0]]
    assert [first] in [list(mark.get_ydata()) for mark in marks]
    assert all(min(line.get_xdata()) > 0 for line in axes.lines if line not in marks)


def test_what_was_not_measured_is_not_drawn():
    evaluation = make_evaluation(grids=False)
    there = {name for name, drawing in plots.DRAWINGS.items() if drawing.has_data(evaluation)}
    assert there == plots.DRAWINGS.keys() - {"transfer", "by_position"}


@pytest.mark.slow
def test_plots_are_the_same_from_saved_results(evaluation):
    again = Evaluation.from_json(evaluation.to_json())
    for name in ("kl_by_layer", "transfer"):
        for kind in plots.FORMATS:
            one, other = (
                plots.rendered(plots.DRAWINGS[name].draw(e), kind) for e in (evaluation, again)
            )
            assert one == other


def test_svg_holds_its_labels_as_text(evaluation):
    svg = plots.rendered(plots.by_layer(evaluation, ["kl_nats"]), "svg").decode()
    assert re.search(r"<text[^>]*>[^<]*tuned", svg)


@pytest.fixture
def history():
    points = ((0, 3.0, 1.0), (1000, 2.0, 0.5), (4000, 1.5, 0.4))
    return [ValidationResult(t // 10, t, t / 100, [a, b]) for t, a, b in points]


def test_learning_curve_shows_every_layer_and_the_mean(history):
    figure = plots.learning_curve(history)
    assert lines(figure.axes[0]) == {(3.0, 2.0, 1.5), (1.0, 0.5, 0.4), (2.0, 1.25, 0.95)}
    assert {text.get_text() for text in figure.axes[0].texts} == {"layer 0", "1", "mean"}
    assert "40 s" in figure.axes[0].get_xlabel()


def test_learning_curve_of_a_single_validation_is_not_drawn(history, tmp_path):
    plots.draw_learning_curve(history[:1], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def read(tiny):
    return trajectory(tiny, None, "def f(x):\n    return $x$\n")


def cells(figure):
    return {
        tuple(map(round, text.get_position())): text.get_text() for text in figure.axes[0].texts
    }


def test_heatmap_says_the_best_token_of_every_cell(read, tokenizer):
    figure, reading = read.heatmap(), read.predictions["logit"]
    found = cells(figure)
    assert len(found) == len(read.rows) * len(read.tokens)
    for (column, row), word in found.items():
        best = shown(tokenizer, int(reading.top_ids[row, column, 0]))
        assert word.rstrip("…").replace("\\$", "$") in best


@pytest.mark.parametrize("metric", ["probability", "log_prob", "logit", "kl_nats", "entropy_nats"])
def test_heatmap_is_coloured_by_what_its_bar_says(read, metric):
    reading = read.predictions["logit"]
    figure = read.heatmap(metric)
    top = reading.top_log_probs[..., 0]
    expected = {
        "probability": top.exp(),
        "log_prob": top,
        "logit": reading.top_logits[..., 0],
        "kl_nats": reading.kl_nats,
        "entropy_nats": reading.entropy_nats,
    }[metric]
    image, bar = figure.axes[0].images[0], figure.axes[-1]
    assert np.allclose(image.get_array(), expected.numpy(), atol=1e-5)
    assert metric.split("_")[0] in bar.get_ylabel().lower().replace("log prob", "log")


def test_heatmap_of_ranks_is_that_of_the_models_best_token_from_1(read):
    figure = read.heatmap("rank", token="final")
    values = figure.axes[0].images[0].get_array()
    assert (values[-1] == 1).all()
    assert figure.axes[0].images[0].norm.vmin == 1


def test_position_0_keeps_out_of_the_limits_of_the_colours(read):
    read.predictions["logit"].kl_nats[0, 0] = 1e6
    assert read.heatmap("kl_nats").axes[0].images[0].norm.vmax < 1e5


def test_part_of_a_trajectory_is_drawn_with_the_model_on_top(read):
    axes = read[::2, 2:5].heatmap().axes[0]
    assert axes.images[0].get_array().shape == (3, 3)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "model"]


def test_lenses_one_above_the_other_have_the_same_colours(tiny):
    lenses = {"tuned": random_lens(tiny), "logit": LogitLens.from_model(tiny)}
    read = trajectory(tiny, lenses, "def f(x):")
    *panels, bar = read.heatmap("kl_nats", ["logit", "tuned"]).axes
    for axes, lens in zip(panels, ("logit", "tuned"), strict=True):
        assert np.allclose(axes.images[0].get_array(), read.predictions[lens].kl_nats.numpy())
        assert axes.get_ylabel() == f"layer, {lens} lens"
    assert panels[0].images[0].norm is panels[1].images[0].norm
    assert bar.get_ylabel() == "KL(model ‖ lens), nats"


def test_differences_have_a_diverging_map_around_0(tiny):
    lenses = {"tuned": random_lens(tiny), "logit": LogitLens.from_model(tiny)}
    one, two = trajectory(tiny, lenses, ["def f(x):", "def g(y):"])
    texts = compare(tiny, lenses, "def f(x):", baseline_text="def g(y):")
    for data, words in (
        (texts, "this text − the baseline"),
        (difference(one, "tuned", "logit"), "tuned − logit"),
    ):
        image = data.heatmap("entropy_nats").axes[0].images[0]
        assert image.norm.vmin == -image.norm.vmax < 0
        assert image.cmap.name == "RdBu"
        assert image.colorbar.ax.get_ylabel().replace("\n", " ") == f"entropy, nats: {words}"
    expected = one.predictions["tuned"].entropy_nats - two.predictions["tuned"].entropy_nats
    found = texts.heatmap("entropy_nats").axes[0].images[0].get_array()
    assert np.allclose(found, expected.numpy(), atol=1e-5)


def test_positions_inputs_and_next_tokens_are_named_and_right_ones_bold(read):
    axes = read[:, 2:7].heatmap().axes[0]
    ids, best = read.input_ids.tolist(), read.predictions["logit"].top_ids[-1, :, 0].tolist()
    below = [label.get_text() for label in axes.get_xticklabels()]
    assert below == [f"{style.drawable(read.vocabulary[ids[p]].shown)}\n{p}" for p in range(2, 7)]
    (top,) = axes.child_axes
    above = top.get_xticklabels()
    assert [x.get_text() for x in above] == [
        style.drawable(read.vocabulary[ids[p + 1]].shown) for p in range(2, 7)
    ]
    assert [x.get_fontweight() == "bold" for x in above] == [
        ids[p + 1] == best[p] for p in range(2, 7)
    ]


def test_right_next_token_is_bold(read):
    read.next_ids[3] = read.predictions["logit"].top_ids[-1, 3, 0]
    (top,) = read.heatmap().axes[0].child_axes
    assert top.get_xticklabels()[3].get_fontweight() == "bold"


def test_cells_that_say_what_the_model_says_are_outlined(read):
    best = read.predictions["logit"].top_ids
    best[1, 2, 0] = best[-1, 2, 0]
    frames = {
        (round(patch.get_x() + 0.46), round(patch.get_y() + 0.44))
        for patch in read.heatmap().axes[0].patches
    }
    same = best[:-1, :, 0] == best[-1, :, 0]
    assert frames == {(x, y) for y, x in same.nonzero().tolist()} != set()


@pytest.mark.parametrize("token", ["final", "x"])
def test_heatmap_is_coloured_by_the_token_that_is_asked_for(tiny, token):
    read = trajectory(tiny, None, "def f(x):", track=["x"])
    found = read.heatmap("log_prob", token=token).axes[0].images[0].get_array()
    for layer, hidden in enumerate(tiny.residual_stream(read.input_ids[None])):
        log_probs = LogitLens.from_model(tiny)(hidden[0], layer).log_softmax(-1)
        best = read.predictions["logit"].top_ids[-1, :, 0]
        ids = best if token == "final" else tiny.encode("x")[0].expand(len(best))
        expected = log_probs.gather(-1, ids[:, None])[:, 0]
        assert np.allclose(found[layer], expected.numpy(), atol=1e-4)


def test_figure_of_another_width_is_the_same_picture(read):
    read = read[:, :8]
    one, other = read.heatmap("kl_nats"), read.heatmap("kl_nats", width=6.0)
    factor = 6.0 / one.get_figwidth()
    assert other.get_size_inches() == pytest.approx(one.get_size_inches() * factor)
    sizes = []
    for figure in (one, other):
        figure.draw_without_rendering()
        cells, bar = figure.axes
        labels = [*cells.texts, cells.yaxis.label, bar.yaxis.label, *bar.get_yticklabels()[:1]]
        sizes.append([label.get_fontsize() for label in labels])
    assert sizes[1] == pytest.approx([size * factor for size in sizes[0]])
    assert texts(one.axes[0]) == texts(other.axes[0])


def test_wide_heatmap_is_folded_so_that_letters_have_5_points(tiny):
    read = trajectory(tiny, None, "a b c d e f " * 4)
    figure = read.heatmap("kl", width=6.0)
    assert figure.get_figwidth() == pytest.approx(6.0)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) > 2
    drawn = np.concatenate([image.get_array() for image in images], 1)
    assert np.allclose(drawn, read.values("kl_nats").numpy())
    figure.draw_without_rendering()
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 5


def test_heatmap_takes_a_title_limits_a_map_and_axes(read):
    axes = Figure().subplots()
    figure = read.heatmap("kl", title="$x$", limits=(1, 2), cmap="magma", ax=axes)
    assert figure is axes.figure
    image = axes.images[0]
    assert (image.norm.vmin, image.norm.vmax, image.cmap.name) == (1, 2, "magma")
    assert image.colorbar.extend == "both"
    assert axes.get_title() == r"\$x\$"
    assert texts(axes) == texts(read.heatmap().axes[0])


def test_outliers_keep_out_of_the_limits_of_the_colours(read):
    values = read.predictions["logit"].kl_nats
    values[:] = torch.linspace(1, 2, values.numel()).view(values.shape)
    values[0, 3:] = 1e6
    figure = read.heatmap("kl")
    assert figure.axes[0].images[0].norm.vmax == values[values < 3][len(read.tokens) :].max()
    assert figure.axes[0].images[0].colorbar.extend == "max"


def test_difference_is_by_default_of_the_models_best_token(tiny):
    lenses = {"tuned": random_lens(tiny), "logit": LogitLens.from_model(tiny)}
    both = difference(trajectory(tiny, lenses, "def f(x):"), "tuned", "logit")
    image = both.heatmap("prob").axes[0].images[0]
    assert np.allclose(image.get_array(), both.values("probability", token="final").numpy())
    assert "model's best token" in image.colorbar.ax.get_ylabel().replace("\n", " ")
    ranks = both.heatmap("rank").axes[0].images[0].norm
    assert ranks(10) - ranks(1) > ranks(1000) - ranks(991)  # logarithmic
    assert ranks(-10) == pytest.approx(1 - ranks(10))


def test_pages_of_a_long_text_have_all_positions_in_the_same_colours(tiny):
    text, other = "a b c d e f " * 12, "b a d c f e " * 12
    one = trajectory(tiny, None, text, stride=16)
    both = compare(tiny, None, text, baseline_text=other, stride=16)
    assert len(one.positions) > 60
    for data in (one, both):
        pages = list(plots.heatmap_pages(data, "entropy_nats"))
        images = [page.axes[0].images[0] for page in pages]
        drawn = np.concatenate([image.get_array() for image in images], 1)
        assert np.allclose(drawn, data.values("entropy_nats").numpy())
        assert len({(image.norm.vmin, image.norm.vmax) for image in images}) == 1


def test_divergence_of_two_texts_is_drawn_from_0(tiny):
    both = compare(tiny, None, "def f(x):", baseline_text="def g(y):")
    figure = both.heatmap("js_nats")
    image = figure.axes[0].images[0]
    assert np.allclose(image.get_array(), both.divergences["logit"]["js_nats"].numpy())
    assert image.norm.vmin == 0
    assert image.cmap.name == "cividis"


def test_letters_without_a_font_are_code_points_and_no_warnings(tiny, recwarn, monkeypatch):
    monkeypatch.setattr(style, "_families", lambda: ["DejaVu Sans"])
    style._is_in_a_font.cache_clear()
    read = trajectory(tiny, None, "'日本' 🎉 é")
    figure = read.heatmap()
    plots.rendered(figure, "png")
    labels = " ".join(label.get_text() for label in figure.axes[0].get_xticklabels())
    style._is_in_a_font.cache_clear()
    assert style.drawable("日x") == "U+65E5x"
    assert not [w for w in recwarn if "lyph" in str(w.message)]
    assert labels.count("⟨") > 1  # bytes of what is several tokens


@pytest.mark.parametrize("word", ["abcdefghij", "WWWWWWWW", "########", "$$$$$$$$$$$$$", "iiiiii"])
def test_word_that_is_cut_is_no_wider_than_asked_for(word):
    drawn = style.drawable(word, 4)
    width = TextPath((0, 0), drawn, size=10).get_extents().width / 10
    assert width <= 4
    assert drawn.endswith("…") == (word != "iiiiii")
    assert drawn.replace(r"\$", "$").rstrip("…") in word


def test_dollars_are_not_read_as_mathematics(read):
    figure = read.heatmap()
    plots.rendered(figure, "png")
    words = [label.get_text().split("\n")[0] for label in figure.axes[0].get_xticklabels()]
    assert r"\$" in words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "loss"}, "metric must be one of probability"),
        ({"lens": "tuned"}, "lens must be one of logit"),
        ({"token": "zebra crossing"}, "zebra␣crossing was not tracked"),
        ({"metric": "rank", "token": "top1"}, "rank of top1 is 1 everywhere"),
        ({"metric": "js_nats"}, "metric must be one of probability"),
        ({"width": 0}, "width must be more than 0"),
        ({"width": 1}, r"width must be at least 1\.9 inches"),
        ({"limits": (1, 1)}, "limits must be two increasing numbers"),
        ({"cmap": "puce"}, "cmap must be a colour map of matplotlib, got 'puce'"),
        ({"ax": Figure().subplots(), "width": 7}, "ax takes one lens"),
    ],
)
def test_heatmap_that_cannot_be_drawn_is_refused(read, options, words):
    with pytest.raises(InputError, match=words):
        read.heatmap(**options)


@pytest.mark.parametrize("metric", ["probability", "rank"])
def test_curves_follow_tokens_through_the_layers_of_every_lens(tiny, metric):
    lenses = {"logit": LogitLens.from_model(tiny), "tuned": random_lens(tiny)}
    read = trajectory(tiny, lenses, "def f(x):", track=["x", " return"])
    axes = read.curves(["x", " return"], metric=metric).axes[0]
    found = [list(line.get_ydata()) for line in axes.lines]
    expected = []
    for token in ("x", " return"):
        place = read.tracked_ids[-1].tolist().index(read.token_id(token))
        for reading in read.predictions.values():
            log_probs = reading.tracked_log_probs[:, -1, place]
            ranks = reading.tracked_ranks[:, -1, place]
            expected.append((ranks if metric == "rank" else log_probs.exp()).tolist())
    assert found == expected
    assert texts(axes) == {"x", "␣return"}
    assert (
        axes.get_ylabel()
        == f"{metric} after {read.vocabulary[int(read.input_ids[-1])].shown} (position 4)"
    )
    figure = axes.figure
    figure.draw_without_rendering()
    for label in axes.texts:  # beside the end of their lines, but for what touches
        place = (
            read.tracked_ids[-1].tolist().index(read.token_id(label.get_text().replace("␣", " ")))
        )
        reading = read.predictions["logit"]
        end = reading.tracked_ranks if metric == "rank" else reading.tracked_log_probs.exp()
        height = axes.transData.transform((0, float(end[-1, -1, place])))[1]
        at = label.get_window_extent()
        assert abs((at.y0 + at.y1) / 2 - height) < 1.5 * (at.y1 - at.y0)


def test_curves_that_cannot_be_drawn_are_refused(read):
    with pytest.raises(InputError, match="metric must be probability or rank"):
        read.curves(["x"], metric="loss")
    with pytest.raises(InputError, match="position must be between"):
        read.curves(["x"], position=99)
    with pytest.raises(InputError, match="x was not tracked"):
        read.curves(["x"])


def test_curves_are_by_default_of_what_the_model_finds_probable(read):
    axes = read.curves().axes[0]
    best = read.predictions["logit"].top_ids[-1, -1, 0]
    assert read.vocabulary[int(best)].shown in texts(axes)
    place = read.tracked_ids[-1].tolist().index(int(best))
    probs = read.predictions["logit"].tracked_log_probs[:, -1, place].exp().tolist()
    assert list(axes.lines[0].get_ydata()) == probs
    assert 1 <= len(axes.lines) <= 5


def test_numbers_of_an_axis_are_plain_up_to_five_digits_and_then_powers_of_ten():
    found = [style.short_number(value) for value in (0.05, 200, 2e4, 1e10, 2e-6)]
    assert found == ["0.05", "200", "20000", "$10^{10}$", r"$2 \cdot 10^{-6}$"]
