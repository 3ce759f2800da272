import pytest
import torch
from conftest import random_lens

from tunedlens import TrainConfig, TunedLens
from tunedlens.fit import LeastSquares, MuonFit


@pytest.fixture
def states():
    """Hidden states of two layers, and a final state that depends on them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 500, 6, generator=generator, dtype=torch.float64)
    final = hidden.sum(0) @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 3.0
    return hidden, final


def test_least_squares_equal_lstsq_when_streamed(states):
    hidden, final = states
    sums = LeastSquares(2, 6)
    for part in torch.arange(500).split(70):
        sums.add(hidden[:, part], final[part])
    inputs = torch.cat([hidden, torch.ones(2, 500, 1)], -1)
    expected = torch.linalg.lstsq(inputs, final - hidden).solution
    assert torch.allclose(sums.solve(ridge=1e-14), expected, rtol=1e-8, atol=1e-10)


def test_least_squares_with_a_great_ridge_are_the_logit_lens(states):
    sums = LeastSquares(2, 6)
    sums.add(*states)
    assert sums.solve(ridge=1e9).abs().max() < 1e-6


def test_least_squares_find_a_map_that_is_there(states):
    hidden, _ = states
    final = hidden[0] + hidden[0] @ torch.diag(torch.arange(6.0).double()) + 2.0
    sums = LeastSquares(2, 6)
    sums.add(hidden, final)
    solution = sums.solve(ridge=1e-12)[0]
    assert torch.allclose(solution[:-1], torch.diag(torch.arange(6.0).double()), atol=1e-8)
    assert torch.allclose(solution[-1], torch.full((6,), 2.0).double(), atol=1e-8)


def first_pass(n_layers=3, d_model=16):
    generator = torch.Generator().manual_seed(1)
    sums = LeastSquares(n_layers, d_model)
    scales = torch.logspace(-1, 2, d_model)  # as in a residual stream, a few directions lead
    sums.add(
        torch.randn(n_layers, 400, d_model, generator=generator) * scales,
        torch.randn(400, d_model, generator=generator),
    )
    return sums


def test_muon_fit_starts_from_the_least_squares(tiny):
    lens = TunedLens.from_model(tiny)
    MuonFit(lens, TrainConfig(), 10).start(first_pass())
    for translator, columns in zip(lens.translators, first_pass().solve(1e-4), strict=True):
        assert torch.allclose(translator.weight.double(), columns[:-1].T, atol=1e-5)
        assert torch.allclose(translator.bias.double(), columns[-1], atol=1e-5)


def test_muon_fit_may_keep_the_translators_it_finds(tiny):
    lens = random_lens(tiny)
    before = {name: value.clone() for name, value in lens.state_dict().items()}
    MuonFit(lens, TrainConfig(), 10).start(first_pass(), translators_too=False)
    for name, value in lens.state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-5)


def test_muon_fit_steps_where_every_input_has_size_1(tiny):
    fit, sums = MuonFit(TunedLens.from_model(tiny), TrainConfig(ridge=1e-9), 10), first_pass()
    fit.start(sums)
    roots = fit.state()["inverse_roots"].double()
    whitened = roots @ (sums.inputs / 400) @ roots.mT
    assert torch.allclose(whitened, torch.eye(17).double().expand(3, 17, 17), atol=0.02)


def test_muon_fit_changes_large_and_small_inputs_alike(tiny):
    lens = TunedLens.from_model(tiny)
    fit = MuonFit(lens, TrainConfig(weight_decay=0.0), 10)
    sums = first_pass()
    fit.start(sums)
    before = [translator.weight.detach().clone() for translator in lens.translators]
    for parameter in lens.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    fit.step(0)
    sizes = (sums.inputs[0].diagonal()[:-1] / 400).sqrt()
    change = (lens.translators[0].weight - before[0]).norm(dim=0) * sizes
    assert sizes.max() / sizes.min() > 500
    assert change.max() / change.min() < 20


def test_muon_fit_goes_on_from_its_state_as_if_never_stopped(tiny):
    def gradients(lens, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in lens.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    config = TrainConfig()
    unbroken, broken = TunedLens.from_model(tiny), TunedLens.from_model(tiny)
    fit = MuonFit(unbroken, config, 10)
    fit.start(first_pass())
    for step in range(4):
        gradients(unbroken, step)
        fit.step(step)
        if step == 1:
            broken.load_state_dict(unbroken.state_dict())
            state = {name: value.clone() for name, value in fit.state().items()}
    again = MuonFit(broken, config, 10)
    again.load_state(state)
    for step in (2, 3):
        gradients(broken, step)
        again.step(step)
    for one, other in zip(unbroken.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_fit_ends_at_a_learning_rate_of_0(tiny):
    lens = TunedLens.from_model(tiny)
    for parameter in lens.parameters():
        parameter.grad = torch.ones_like(parameter)
    MuonFit(lens, TrainConfig(), 10).step(10)
    assert all(not parameter.any() for parameter in lens.parameters())
