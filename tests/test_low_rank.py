"""Translators of low rank."""

import dataclasses

import pytest
import torch
from conftest import short_run
from safetensors.torch import load_file

from tunedlens import InputError, TunedLens, load_lens, load_model, train
from tunedlens.fit import LeastSquares, nearest_of_rank


@pytest.fixture
def config(tiny_folder, text_file):
    return short_run(
        tiny_folder, text_file, tokens=640, init_tokens=512, validation_tokens=64, low_rank=4
    )


def states_and_moments(count=500, d_model=6):
    """Correlated states with a mean, and their second moment."""
    torch.manual_seed(0)
    states = torch.randn(count, d_model) @ torch.randn(d_model, d_model) + 3
    sums = LeastSquares(1, d_model)
    sums.add([states], states)
    return states.double(), sums.second_moment


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_nearest_translator_leaves_the_error_of_the_singular_values(rank):
    states, second_moment = states_and_moments()
    columns = torch.randn(1, 6, 7, dtype=torch.float64)
    left, right, bias = (part[0] for part in nearest_of_rank(columns, second_moment, rank))
    added = states @ columns[0, :, :-1].T + columns[0, :, -1]
    error = (states @ right.T @ left.T + bias - added).square().sum()
    # Eckart and Young: no matrix of this rank is nearer to what is added, after its mean.
    values = torch.linalg.svdvals(added - added.mean(0))
    torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fit", ["preconditioned", "closed-form"])
def test_run_of_low_rank_saves_thin_factors(config, tmp_path, fit):
    tokens = None if fit == "closed-form" else config.tokens
    config = dataclasses.replace(config, fit=fit, tokens=tokens)
    evaluation = train(config, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "lens.safetensors")
    for layer in range(3):
        assert tensors[f"resid_pre.{layer}.left"].shape == (16, 4)
        assert tensors[f"resid_pre.{layer}.right"].shape == (4, 16)
    lens = load_lens(tmp_path / "run", load_model(config.model.model, device="cpu"))
    hidden = torch.randn(5, 16)
    translator = lens.translator(1)
    expected = hidden + hidden @ translator.weight.T + translator.bias
    torch.testing.assert_close(lens.transform_hidden(hidden, 1), expected)
    assert torch.linalg.matrix_rank(translator.weight) <= 4
    logit, tuned = (evaluation.of_lens(name, "kl_nats") for name in evaluation.lenses)
    assert tuned.value < logit.value
    assert "at most 4" in (tmp_path / "run" / "README.md").read_text()


def test_rank_of_the_width_changes_nothing(config, tmp_path):
    model = load_model(config.model.model, device="cpu")
    lenses = []
    for name, rank in (("low", 16), ("full", None)):
        train(dataclasses.replace(config, low_rank=rank), tmp_path / name)
        lenses.append(load_lens(tmp_path / name, model))
    for low, full in zip(*(lens.all_translators() for lens in lenses), strict=True):
        for one, other in ((low.weight, full.weight), (low.bias, full.bias)):
            assert torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


def test_lens_of_low_rank_starts_another_run(config, tmp_path):
    train(config, tmp_path / "run")
    again = dataclasses.replace(config, low_rank=None, init=str(tmp_path / "run"), lr=1e-9)
    train(again, tmp_path / "again")
    model = load_model(config.model.model, device="cpu")
    low, full = (load_lens(tmp_path / name, model) for name in ("run", "again"))
    for one, other in zip(low.all_translators(), full.all_translators(), strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_rank": 0}, "--low-rank must be at least 1, got 0"),
        ({"low_rank": 17}, "--low-rank must be at most 16, the width of .*; got 17"),
        ({"bias_only": True}, "--low-rank does not work with --bias-only"),
        ({"fit": "jacobian", "tokens": None}, "--low-rank does not work with --fit jacobian"),
        ({"fit": "sgd"}, "--low-rank does not work with --fit sgd"),
    ],
)
def test_ranks_that_cannot_be_are_refused(config, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, **settings), tmp_path / "run")


def test_rank_of_a_lens_is_at_most_its_width(tiny):
    with pytest.raises(InputError, match=r"rank .* between 1 and 16, the width of tiny; got 17"):
        TunedLens.from_model(tiny, rank=17)
