import pytest
import torch
from conftest import random_lens, reference_kl

from tunedlens import InputError, JacobianLens, TunedLens
from tunedlens.engine import LensKL, accumulate_gradient
from tunedlens.fit import (
    LeastSquares,
    MeanJacobian,
    PreconditionedMuon,
    TorchOptimizer,
    ValidationResult,
    converged_layers,
    mean_lens,
    unigram_lens,
)
from tunedlens.fit.jacobian import SKIPPED_POSITIONS
from tunedlens.fit.least_squares import RIDGES
from tunedlens.fit.optimizer import _orthogonalised


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
    assert torch.allclose(sums.solve(ridge=1e-14), expected.mT, rtol=1e-8, atol=1e-10)


def test_least_squares_with_a_great_ridge_are_the_logit_lens(states):
    sums = LeastSquares(2, 6)
    sums.add(*states)
    assert sums.solve(ridge=1e9).abs().max() < 1e-6


def test_least_squares_are_solved_when_rounding_makes_the_inputs_indefinite(states):
    hidden, final = (state.float() for state in states)
    hidden = torch.cat([hidden[..., :3], hidden[..., :3]], -1) * 1e3
    sums = LeastSquares(2, 6)
    sums.add(hidden, final)
    assert torch.linalg.eigvalsh(sums.sums().inputs).amin() < 0
    inputs = torch.cat([hidden.double(), torch.ones(2, 500, 1)], -1)
    wanted = final.double() - hidden.double()
    best = inputs @ torch.linalg.pinv(inputs) @ wanted
    found = inputs @ sums.solve(ridge=1e-8).mT
    error, least = ((wanted - guess).square().mean((1, 2)) for guess in (found, best))
    assert torch.allclose(error, least, rtol=0.01)


def test_least_squares_find_a_map_that_is_there(states):
    hidden, _ = states
    final = hidden[0] + hidden[0] @ torch.diag(torch.arange(6.0).double()) + 2.0
    sums = LeastSquares(2, 6)
    sums.add(hidden, final)
    solution = sums.solve(ridge=1e-12)[0]
    assert torch.allclose(solution[:, :-1], torch.diag(torch.arange(6.0).double()), atol=1e-8)
    assert torch.allclose(solution[:, -1], torch.full((6,), 2.0).double(), atol=1e-8)


def test_mean_square_error_of_least_squares_is_that_of_their_predictions(states):
    hidden, final = states
    sums = LeastSquares(2, 6)
    sums.add(hidden, final)
    solution = sums.solve(ridge=0.1)
    predicted = hidden + hidden @ solution[..., :-1].mT + solution[:, None, :, -1]
    expected = (predicted - final).square().mean((1, 2))
    assert torch.allclose(sums.mean_square_error(solution), expected, rtol=1e-10)


def test_ridge_is_the_one_that_errs_least_on_held_out_text(states):
    hidden, final = states
    noise = torch.randn(final.shape, generator=torch.Generator().manual_seed(3)).double() * 30
    few, held_out = LeastSquares(2, 6), LeastSquares(2, 6)
    few.add(hidden[:, :12], (final + noise)[:12])
    held_out.add(hidden[:, 12:], final[12:])
    errors = torch.stack([held_out.mean_square_error(few.solve(ridge)) for ridge in RIDGES])
    best = few.best_ridge(held_out)
    assert torch.equal(held_out.mean_square_error(few.solve(best)), errors.min(0).values)
    assert (best > RIDGES[0]).all()  # with so little text and so much noise, less is worse


def first_pass(n_layers=3, d_model=16):
    generator = torch.Generator().manual_seed(1)
    sums = LeastSquares(n_layers, d_model)
    scales = torch.logspace(-1, 2, d_model)  # as in a residual stream, a few directions lead
    sums.add(
        torch.randn(n_layers, 400, d_model, generator=generator) * scales,
        torch.randn(400, d_model, generator=generator),
    )
    return sums


def random_gradients(lens, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in lens.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def preconditioned(lens, step_size=0.1, momentum=0.8, weight_decay=0.0):
    optimizer = PreconditionedMuon(lens, step_size, momentum, weight_decay)
    optimizer.initialise(first_pass(), first_pass().solve(1e-4))
    return optimizer


def assert_same_translators(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


EVERY_FIT = {
    "preconditioned": preconditioned,
    **{
        name: lambda lens, name=name: TorchOptimizer(lens, name, 0.01, 0.9, 1e-3)
        for name in ("sgd", "muon")
    },
}
ALL = [True] * 3


@pytest.mark.parametrize("name", EVERY_FIT)
def test_optimizer_continues_from_its_state_as_if_never_stopped(tiny, name):
    unbroken = EVERY_FIT[name](TunedLens.from_model(tiny))
    for step in range(4):
        if step == 2:
            state = {key: value.clone() for key, value in unbroken.state().items()}
        random_gradients(unbroken.lens, step)
        unbroken.step(ALL, step / 4)
    again = EVERY_FIT[name](TunedLens.from_model(tiny))
    again.load_state(state)
    for step in (2, 3):
        random_gradients(again.lens, step)
        again.step(ALL, step / 4)
    assert_same_translators(unbroken.lens, again.lens)
    assert_same_translators(unbroken.result(), again.result())


@pytest.mark.parametrize("name", EVERY_FIT)
def test_steps_lower_the_kl_of_every_layer(tiny, name):
    torch.manual_seed(0)
    states = torch.randn(4, 200, 16)
    optimizer, kl = EVERY_FIT[name](TunedLens.from_model(tiny)), LensKL(tiny.unembedding)
    before = accumulate_gradient(optimizer.lens, states, kl)
    for index in range(30):
        optimizer.step(ALL, index / 30)
        accumulate_gradient(optimizer.lens, states, kl)
    assert (accumulate_gradient(optimizer.result(), states, kl) < before).all()


def test_inactive_layers_stay_as_they_are(tiny):
    optimizer = preconditioned(TunedLens.from_model(tiny))
    before = {key: value.clone() for key, value in optimizer.result().state_dict().items()}
    random_gradients(optimizer.lens, 0)
    optimizer.step([True, False, True], 0.0)
    for key, value in optimizer.result().state_dict().items():
        assert torch.equal(value, before[key]) == (".1." in key)


def test_preconditioned_steps_start_from_the_closed_form(tiny):
    optimizer, expected = preconditioned(TunedLens.from_model(tiny)), first_pass().solve(1e-4)
    for lens in (optimizer.lens, optimizer.result()):
        for translator, columns in zip(lens.all_translators(), expected, strict=True):
            assert torch.allclose(translator.weight.double(), columns[:, :-1], atol=1e-5)
            assert torch.allclose(translator.bias.double(), columns[:, -1], atol=1e-5)


def test_preconditioned_steps_may_start_from_the_lens_as_it_is(tiny):
    lens = random_lens(tiny)
    before = {name: value.clone() for name, value in lens.state_dict().items()}
    optimizer = PreconditionedMuon(lens, 0.1, 0.8, 0.0)
    optimizer.initialise(first_pass(), first_pass().solve(1e-4), from_solution=False)
    for name, value in optimizer.result().state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-6)


def test_a_layer_is_reverted_to_the_closed_form(tiny):
    optimizer = preconditioned(TunedLens.from_model(tiny))
    closed_form = {key: value.clone() for key, value in optimizer.result().state_dict().items()}
    random_gradients(optimizer.lens, 0)
    optimizer.step(ALL, 0.0)
    optimizer.revert(1)
    for key, value in optimizer.result().state_dict().items():
        assert torch.equal(value, closed_form[key]) == (".1." in key)


def test_preconditioned_step_is_a_fraction_of_the_error_of_the_closed_form(tiny):
    optimizer, sums = preconditioned(TunedLens.from_model(tiny), 0.1, 0.0), first_pass()
    error = sums.mean_square_error(sums.solve(1e-4)).sqrt()
    before = [translator.weight.detach().clone() for translator in optimizer.lens.all_translators()]
    random_gradients(optimizer.lens, 0)
    optimizer.step(ALL, 0.0)
    generator = torch.Generator().manual_seed(5)
    scales = torch.logspace(-1, 2, 16)
    for layer, translator in enumerate(optimizer.lens.all_translators()):
        inputs = torch.randn(5000, 16, generator=generator) * scales
        change = inputs @ (translator.weight.detach() - before[layer]).T
        assert change.square().mean().sqrt() == pytest.approx(0.1 * float(error[layer]), rel=0.35)


def test_preconditioner_brings_large_and_small_inputs_closer(tiny):
    optimizer = preconditioned(TunedLens.from_model(tiny))
    before = optimizer.lens.all_translators()[0].weight.detach().clone()
    random_gradients(optimizer.lens, 2)
    optimizer.step(ALL, 0.0)
    sizes = (first_pass().sums().inputs[0].diagonal()[:-1] / 400).sqrt()
    change = (optimizer.lens.all_translators()[0].weight - before).norm(dim=0) * sizes
    assert sizes.max() / sizes.min() > 500
    # The fourth root leaves the square root of that.
    assert 5 < change.max() / change.min() < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_keeps_directions_and_brings_singular_values_near_one(dtype):
    left, _, right = torch.linalg.svd(
        torch.randn(3, 12, 13, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    matrices = (left * torch.linspace(2, 100, 12)) @ right
    values = (left.mT @ _orthogonalised(matrices, dtype) @ right.mT).diagonal(dim1=1, dim2=2)
    assert ((values > 0.6) & (values < 1.3)).all()
    found = torch.linalg.svdvals(_orthogonalised(matrices, dtype))
    assert torch.allclose(found, values.sort(descending=True).values, atol=0.05)


def test_orthogonalised_in_float32_makes_little_of_rounding():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(1, 64, 65, generator=generator)
    rounded = matrices * (1 + 2e-6 * torch.randn(matrices.shape, generator=generator))
    change = {
        dtype: (_orthogonalised(rounded, dtype) - _orthogonalised(matrices, dtype)).norm() / 8
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert change[torch.float32] < 2e-5
    assert change[torch.bfloat16] > 1e-3  # why a run in float32 does not use it


def test_result_is_an_average_that_leans_to_the_latest_steps(tiny):
    optimizer = preconditioned(TunedLens.from_model(tiny))
    moved = []
    for index in range(40):
        random_gradients(optimizer.lens, index)
        optimizer.step(ALL, 0.0)
        moved.append(optimizer.lens.all_translators()[0].weight.detach().clone())
    weights = torch.tensor([float((t + 1) * (t + 2)) for t in range(40)])  # t² and lower terms
    expected = (torch.stack(moved) * (weights / weights.sum())[:, None, None]).sum(0)
    assert torch.allclose(optimizer.result().all_translators()[0].weight, expected, atol=1e-4)


def test_baselines_end_at_a_learning_rate_of_0(tiny):
    for name in ("sgd", "muon"):
        lens = TunedLens.from_model(tiny)
        random_gradients(lens, 0)
        TorchOptimizer(lens, name, 0.1, 0.9, 0.0).step(ALL, 1.0)
        assert all(not parameter.any() for parameter in lens.parameters())


@pytest.mark.parametrize("chunk", [7, 1000])
def test_accumulated_gradient_is_that_of_the_plain_kl(tiny, chunk):
    torch.manual_seed(0)
    states, lens = torch.randn(4, 30, 16), random_lens(tiny)
    kl = LensKL(tiny.unembedding.centred(), chunk=chunk)
    figures = accumulate_gradient(lens, states, kl, layers=[0, 2], fraction=0.5)
    translated = torch.stack([lens.transform_hidden(states[layer], layer) for layer in (0, 2)])
    expected = reference_kl(translated, states[-1], tiny.unembedding) / 2
    parameters = [*lens.all_translators()[0].parameters(), *lens.all_translators()[2].parameters()]
    gradients = torch.autograd.grad(expected.sum(), parameters)
    assert torch.allclose(figures[[0, 2]], expected, rtol=1e-4)
    assert figures[1] == 0
    assert lens.all_translators()[1].weight.grad is None
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def converged(*points):
    return converged_layers(
        [ValidationResult(i, tokens, 0.0, kl) for i, (tokens, kl) in enumerate(points)]
    )


def test_layer_has_converged_when_doubling_gains_less_than_a_fiftieth_in_two_validations():
    points = ((0, [3.0, 3.0]), (100, [2.0, 1.0]), (150, [1.5, 0.8]), (200, [1.0, 0.981]))
    assert converged(*points) == [False, False]
    assert converged(*points, (300, [0.9, 0.9])) == [False, True]
    assert converged(*points, (300, [0.9, 0.7])) == [False, False]


def test_layer_whose_kl_rises_has_converged():
    points = ((0, [1.0]), (10, [0.5]), (14, [0.5]), (20, [0.6]), (28, [0.6]))
    assert converged(*points) == [True]


def test_no_layer_has_converged_before_the_first_doubling():
    assert converged((0, [1.0])) == [False]
    assert converged((0, [1.0]), (10, [0.5]), (19, [0.5])) == [False]


@pytest.mark.parametrize("targets", ["later", "same"])
def test_mean_jacobian_equals_every_derivative_by_itself(tiny, tokenizer, targets):
    ids = torch.tensor([tokenizer("def f(x):\n    return x + 1\n" * 4)["input_ids"][:24]] * 2)
    ids[1] = ids[1].flip(0)
    jacobian = MeanJacobian(range(3), 16, targets=targets)
    for block in ids:  # random signs average out
        for _ in range(1 if targets == "later" else 40):
            jacobian.add(tiny, block[None])
    states = tiny.residual_stream(ids)
    for layer in range(3):

        def final(hidden, layer=layer):
            for block in tiny.blocks[layer:]:
                hidden = block(hidden)
            return hidden

        by_hand = torch.zeros(16, 16)
        for row in range(2):
            every = torch.autograd.functional.jacobian(final, states[layer][row, None])
            kept = every[0, SKIPPED_POSITIONS:, :, 0, SKIPPED_POSITIONS:]
            if targets == "later":
                by_hand += kept.sum(0).mean(1) / 2
            else:
                by_hand += kept.diagonal(dim1=0, dim2=2).mean(-1) / 2
        off = (jacobian.mean[layer].float() - by_hand).norm() / by_hand.norm()
        assert off < (1e-4 if targets == "later" else 0.1)


def test_jacobian_lens_applies_the_jacobian(tiny):
    jacobians = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    lens = JacobianLens.from_jacobians(tiny, jacobians)
    hidden = torch.randn(5, 16)
    assert torch.allclose(lens.transform_hidden(hidden, 1), hidden @ jacobians[1].T, atol=1e-5)
    assert torch.equal(lens.transform_hidden(hidden, 3), hidden)


def test_unigram_lens_counts_the_text_and_adds_one(tiny):
    blocks = [torch.tensor([1, 1, 2, 5]), torch.tensor([1, 7, 7, 7])]
    probs = unigram_lens(tiny, blocks, tokens=6).log_probs.exp()
    assert probs[[1, 2, 5, 7, 9]] * (6 + 4096) == pytest.approx([4, 2, 2, 2, 1], rel=1e-4)
    assert probs.sum().item() == pytest.approx(1)


def test_mean_lens_is_the_average_of_what_the_model_says(tiny):
    blocks = torch.randint(0, 4096, (11, 12), generator=torch.Generator().manual_seed(0))
    expected = tiny.model(blocks).logits.double().softmax(-1).flatten(0, 1)[:-4].mean(0)
    actual = mean_lens(tiny, blocks, tokens=11 * 12 - 4).log_probs.double().exp()
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("make", [unigram_lens, mean_lens])
def test_baseline_of_no_text_is_refused(tiny, make):
    with pytest.raises(InputError, match="a baseline needs text"):
        make(tiny, [], tokens=10)
