"""Ablation, causal bases, effects, alignment and inversion, against brute force."""

import copy
import re

import pytest
import torch
from conftest import make_gpt2, make_llama, random_lens
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from tunedlens import (
    Block,
    CausalBasis,
    CausalEffects,
    Directions,
    FrozenModel,
    Head,
    InputError,
    LogitLens,
    Neuron,
    ablated,
    causal_basis,
    causal_effects,
    response_alignment,
)
from tunedlens.causal import Alignment, aitchison_similarity, spearman
from tunedlens.causal.basis import Influence
from tunedlens.engine.distributions import kl_divergence, log_probs
from tunedlens.evaluation import Estimate
from tunedlens.model import HookPoint, Unembedding
from tunedlens.report import plots

MODES = ("zero", "mean", "resample")


def token_ids(batch=3, seq=8, seed=0):
    return torch.randint(4096, (batch, seq), generator=torch.Generator().manual_seed(seed))


def orthonormal(count, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, count, generator=generator)).Q.T.contiguous()


def logits(model, ids):
    with torch.no_grad():
        return model.model(ids, use_cache=False).logits


def without(states, basis, coordinates):
    """States whose coordinates along the rows of a basis are replaced."""
    return states - states @ basis.T @ basis + coordinates @ basis


def by_hand(mode, values):
    """What takes the place of values; here the positions are shifted by one for `resample`."""
    flat = values.flatten(0, 1)
    found = {"zero": flat * 0, "mean": flat.mean(0).expand_as(flat), "resample": flat.roll(1, 0)}
    return found[mode].view_as(values)


@pytest.fixture
def shifted(monkeypatch):
    """`resample` takes the value of the position before: the random cycle goes round in order."""
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.usefixtures("shifted")
def test_directions_are_ablated_as_by_a_hook_on_the_state(tiny, mode, layer):
    basis, ids = orthonormal(2), token_ids()

    def hook(_module, args):
        return (without(args[0], basis, by_hand(mode, args[0] @ basis.T)), *args[1:])

    parts = [*tiny.model.transformer.h, tiny.model.transformer.ln_f]
    handle = parts[layer].register_forward_pre_hook(hook)
    expected = logits(tiny, ids)
    handle.remove()
    with ablated(tiny, Directions(basis, layer), mode):
        found = logits(tiny, ids)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, logits(tiny, ids), atol=1e-3)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_directions_of_a_term_are_ablated_as_by_a_hook_on_its_module(tiny, site):
    basis, ids, block = orthonormal(2), token_ids(), tiny.model.transformer.h[1]

    def hook(_module, _args, output):
        is_tuple = isinstance(output, tuple)
        added = output[0] if is_tuple else output
        changed = without(added, basis, by_hand("mean", added @ basis.T))
        return (changed, *output[1:]) if is_tuple else changed

    handle = (block.attn if site == "attn_out" else block.mlp).register_forward_hook(hook)
    expected = logits(tiny, ids)
    handle.remove()
    with ablated(tiny, Directions(basis, 1, site), "mean"):
        found = logits(tiny, ids)
    torch.testing.assert_close(found, expected)


def test_directions_between_attention_and_mlp_are_set_to_zero(tiny):
    basis, ids = orthonormal(2), token_ids()
    middle, output = tiny.states_at([HookPoint("resid_mid", 1), HookPoint("resid_pre", 2)], ids)
    block = tiny.model.transformer.h[1]
    changed = without(middle, basis, torch.zeros(*ids.shape, 2))
    with torch.no_grad():
        expected = changed + block.mlp(block.ln_2(changed))
    with ablated(tiny, Directions(basis, 1, "resid_mid"), "zero"):
        found = tiny.residual_stream(ids)[2]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, output, atol=1e-3)


def test_resample_gives_every_position_the_value_of_another_one(tiny):
    basis, ids = orthonormal(1), token_ids()
    before = (tiny.residual_stream(ids)[1] @ basis.T).flatten()
    with ablated(tiny, Directions(basis, 1), "resample", seed=3):
        after = (tiny.residual_stream(ids)[1] @ basis.T).flatten()
    torch.testing.assert_close(after.sort().values, before.sort().values)
    assert ((after - before).abs() > 1e-4).all()


def test_block_is_ablated_as_if_it_were_not_there(tokenizer):
    gpt2, ids = make_gpt2(), token_ids()
    model = FrozenModel(copy.deepcopy(gpt2), tokenizer)
    del gpt2.transformer.h[1]
    with ablated(model, Block(1), "zero"):
        found = logits(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(found, gpt2(ids, use_cache=False).logits)


def test_block_adds_its_mean(tiny):
    ids = token_ids()
    states = tiny.residual_stream(ids)
    with ablated(tiny, Block(1), "mean"):
        found = tiny.residual_stream(ids)[2]
    mean = (states[2] - states[1]).mean((0, 1))
    torch.testing.assert_close(found, states[1] + mean)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize(
    ("target", "columns"), [(Head(1, 1), slice(8, 16)), (Neuron(1, 5), slice(5, 6))]
)
def test_head_and_neuron_are_ablated_as_if_their_weights_were_zero(
    tokenizer, make, target, columns
):
    plain, ids = make(), token_ids()
    model = FrozenModel(copy.deepcopy(plain), tokenizer)
    is_head = isinstance(target, Head)
    with torch.no_grad():
        if make is make_gpt2:
            block = plain.transformer.h[1]
            (block.attn if is_head else block.mlp).c_proj.weight[columns] = 0
        else:
            block = plain.model.layers[1]
            module = block.self_attn.o_proj if is_head else block.mlp.down_proj
            module.weight[:, columns] = 0
        expected = plain.eval()(ids, use_cache=False).logits
    with ablated(model, target, "zero"):
        found = logits(model, ids)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, logits(model, ids), atol=1e-4)


def test_several_targets_are_ablated_together(tiny):
    ids = token_ids()
    with ablated(tiny, Block(0)), ablated(tiny, Neuron(1, 0)), ablated(tiny, Head(2, 0)):
        expected = logits(tiny, ids)
    with ablated(tiny, [Block(0), Neuron(1, 0), Head(2, 0)]):
        torch.testing.assert_close(logits(tiny, ids), expected)


def test_mean_is_that_of_the_reference(tiny):
    basis, ids, reference = orthonormal(2), token_ids(), token_ids(5, 9, seed=1)
    mean = (tiny.residual_stream(reference)[1] @ basis.T).mean((0, 1))
    expected = without(tiny.residual_stream(ids)[1], basis, mean.expand(*ids.shape, 2))
    with ablated(tiny, Directions(basis, 1), "mean", reference=reference):
        torch.testing.assert_close(tiny.residual_stream(ids)[1], expected)


def test_values_are_drawn_from_the_reference(tiny):
    basis, ids, reference = orthonormal(1), token_ids(), token_ids(1, 1, seed=1)
    value = (tiny.residual_stream(reference)[1] @ basis.T).flatten()
    with ablated(tiny, Directions(basis, 1), "resample", reference=reference):
        found = (tiny.residual_stream(ids)[1] @ basis.T).flatten()
    torch.testing.assert_close(found, value.expand_as(found))


def test_first_positions_are_left_alone_and_do_not_count(tiny):
    basis, ids = orthonormal(2), token_ids()
    clean = tiny.residual_stream(ids)[1]
    mean = (clean[:, 1:] @ basis.T).mean((0, 1))
    expected = without(clean, basis, mean.expand(*ids.shape, 2))
    with ablated(tiny, Directions(basis, 1), "mean", skip_first=1):
        found = tiny.residual_stream(ids)[1]
    torch.testing.assert_close(found[:, 0], clean[:, 0])
    torch.testing.assert_close(found[:, 1:], expected[:, 1:])


def test_model_is_as_before_when_the_context_is_left(tiny):
    ids = token_ids()
    before = logits(tiny, ids)
    with pytest.raises(KeyError), ablated(tiny, [Block(0), Head(1, 1), Neuron(2, 3)], "zero"):
        raise KeyError
    assert torch.equal(logits(tiny, ids), before)


@pytest.mark.parametrize(
    ("target", "mode", "message"),
    [
        (Directions(orthonormal(2, 12), 1), "mean", "16 dimensions, got directions of 12"),
        (Directions(torch.ones(2, 16), 1), "mean", "length 1 at right angles"),
        (Directions(torch.zeros(16), 1), "mean", "length 1 at right angles"),
        (Directions(orthonormal(1), 4), "mean", "layer must be between 0 and 3"),
        (Directions(orthonormal(1), 3, "resid_mid"), "mean", "layer must be between 0 and 2"),
        (Directions(orthonormal(1), 1, "resid"), "mean", "site must be one of resid_pre"),
        (Block(3), "mean", "layer must be between 0 and 2"),
        (Head(1, 2), "mean", "head must be between 0 and 1"),
        (Neuron(1, 64), "mean", "neuron must be between 0 and 63"),
        (Block(1), "median", "mode must be one of mean, zero, resample; got 'median'"),
    ],
)
def test_targets_that_a_model_lacks_are_refused(tiny, target, mode, message):
    with pytest.raises(InputError, match=re.escape(message)), ablated(tiny, target, mode):
        pass


def test_heads_of_a_model_without_attention_are_refused(tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=4096, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = FrozenModel(MambaForCausalLM(config), tokenizer)
    with (
        pytest.raises(InputError, match=r"MambaMixer.*heads are not supported"),
        ablated(model, Head(0, 0)),
    ):
        pass


def test_single_position_has_no_other_to_take_values_from(tiny):
    with (
        pytest.raises(InputError, match="mean ablation uses values of other positions"),
        ablated(tiny, Block(1), "mean"),
    ):
        tiny.residual_stream(token_ids(1, 1))


def brute_force_influence(lens, layer, states, vector):
    """The mean KL under mean ablation of a direction, by its definition."""
    ablated = without(states, vector[None], (states @ vector).mean().expand(len(states), 1))
    clean, changed = (log_probs(lens(one, layer)) for one in (states, ablated))
    return kl_divergence(clean, changed).mean()


def test_influence_and_its_gradient_are_those_of_autograd(tiny):
    lens = random_lens(tiny).double()
    states = tiny.residual_stream(token_ids())[1].flatten(0, 1).double()
    vector = orthonormal(1)[0].double().requires_grad_()
    influence = Influence(lens, HookPoint("resid_pre", 1), states, "mean", 0)
    mean, gradient = influence.mean_and_gradient(vector.detach())
    # The gradient is that in a vector of any length, along which (h · v) v replaces coordinates.
    change = states.mean(0) - states
    clean = log_probs(lens(states, 1)).detach()
    changed = lens(states + (change @ vector)[:, None] * vector, 1)
    expected = kl_divergence(clean, log_probs(changed)).mean()
    expected.backward()
    assert mean == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, vector.grad)


def test_basis_has_the_influence_that_it_says_and_beats_other_directions(tiny):
    lens, ids = random_lens(tiny), token_ids(2, 16)
    basis = causal_basis(tiny, lens, ids, 1, k=3)
    states = tiny.residual_stream(ids)[1].flatten(0, 1)
    with torch.no_grad():
        expected = [brute_force_influence(lens, 1, states, vector) for vector in basis.vectors]
        others = torch.nn.functional.normalize(torch.randn(30, 16), dim=1)
        best = max(brute_force_influence(lens, 1, states, other) for other in others)
    torch.testing.assert_close(basis.influence_nats, torch.stack(expected), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(basis.vectors @ basis.vectors.T, torch.eye(3))
    assert (basis.influence_nats.diff() <= 0).all()
    assert basis.influence_nats[0] > best


def test_basis_of_a_linear_lens_is_that_of_the_eigenproblem(tiny, monkeypatch):
    # Without a norm, with logits near 0 and states of the same variance in all directions, the
    # influence is to second order half of v · F v, with F = W' (I / V - 1 1' / V²) W.
    generator = torch.Generator().manual_seed(0)
    weight = 1e-3 * torch.randn(256, 16, dtype=torch.float64, generator=generator)
    weight *= torch.linspace(1, 2, 16)
    states = torch.randn(64, 16, dtype=torch.float64, generator=generator)
    states = torch.linalg.qr(states).Q * 128**0.5
    states = torch.cat([states, -states]).view(4, 32, 16) / 2**0.5
    monkeypatch.setattr(tiny, "states_at", lambda _points, _ids: [states])
    lens = LogitLens(Unembedding(nn.Sequential(), weight, None), tiny.identity)
    basis = causal_basis(tiny, lens, token_ids(4, 32), 1, k=6)
    values, vectors = torch.linalg.eigh(torch.cov(weight.T, correction=0))
    values, vectors = values.flip(0)[:6], vectors.flip(1)[:, :6]
    torch.testing.assert_close(basis.influence_nats.double(), values / 2, rtol=1e-3, atol=0)
    overlap = (basis.vectors.double() @ vectors).abs()
    torch.testing.assert_close(overlap, torch.eye(6).double(), atol=0.02, rtol=0)


def test_saved_basis_is_the_same(tiny, tmp_path):
    basis = causal_basis(tiny, random_lens(tiny), token_ids(), 1, k=2, mode="zero")
    basis.save(tmp_path / "basis.safetensors")
    again = CausalBasis.load(tmp_path / "basis.safetensors")
    assert len(repr(again)) < 100
    for name, value in vars(basis).items():
        other = getattr(again, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def test_file_that_is_no_basis_is_refused(tiny, tmp_path):
    (tmp_path / "text").write_text("no basis")
    random_lens(tiny).save(tmp_path / "lens")
    for path in (tmp_path / "text", tmp_path / "lens" / "lens.safetensors"):
        with pytest.raises(InputError, match=r"damaged|not a saved basis"):
            CausalBasis.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, "layer must be between 0 and 3"),
        ({"layer": 1, "k": 17}, "k must be between 1 and 16"),
        ({"layer": 1, "skip_first": 8}, "skip_first must be between 0 and 7"),
        ({"layer": 1, "mode": "none"}, "mode must be one of"),
        ({"layer": 1, "site": "attn_out"}, "not at attn_out"),
    ],
)
def test_basis_that_cannot_be_found_is_refused(tiny, settings, message):
    with pytest.raises(InputError, match=message):
        causal_basis(tiny, random_lens(tiny), token_ids(), **settings)


def kl_under_ablation(tiny, lens, ids, vector, layer):
    """KL of lens and model at every position, with a hook written by hand."""

    def hook(_module, args):
        values = args[0] @ vector
        return (args[0] + (values.mean() - values)[..., None] * vector, *args[1:])

    states, clean = tiny.residual_stream(ids), logits(tiny, ids)
    handle = tiny.model.transformer.h[layer].register_forward_pre_hook(hook)
    changed_states, changed = tiny.residual_stream(ids), logits(tiny, ids)
    handle.remove()
    with torch.no_grad():
        read = [lens(one[layer], layer) for one in (states, changed_states)]
    pairs = (read, (clean, changed))
    return [kl_divergence(log_probs(one), log_probs(other)) for one, other in pairs]


def test_effects_are_those_of_hooks_with_errors_clustered_by_sequence(tiny):
    lens, ids, basis = random_lens(tiny), token_ids(), orthonormal(3)
    effects = causal_effects(tiny, lens, ids, Directions(basis, 1))
    found = [
        (*lens_nats, *nats)
        for lens_nats, nats in zip(effects.lens_nats, effects.model_nats, strict=True)
    ]
    expected = []
    for vector in basis:
        by_sequence = [kl.mean(1) for kl in kl_under_ablation(tiny, lens, ids, vector, 1)]
        expected.append(
            [float(f(kl)) for kl in by_sequence for f in (torch.mean, lambda k: k.std() / 3**0.5)]
        )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_effect_of_a_head_on_the_lens_is_read_after_its_block(tiny):
    lens, ids = random_lens(tiny), token_ids()
    effects = causal_effects(tiny, lens, ids, [Head(0, 1), Block(1)], "zero", skip_first=2)
    before = tiny.residual_stream(ids)
    for index, (target, layer) in enumerate(((Head(0, 1), 1), (Block(1), 2))):
        with ablated(tiny, target, "zero", skip_first=2):
            after = tiny.residual_stream(ids)
        with torch.no_grad():
            read = [log_probs(lens(one[layer][:, 2:], layer)) for one in (before, after)]
        expected = float(kl_divergence(*read).mean())
        assert effects.lens_nats[index].value == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_spearman_with_ties_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(5, (40,), generator=generator).float()
    other = one + torch.randint(5, (40,), generator=generator)
    found = spearman(one.tolist(), other.tolist())
    assert found.value == pytest.approx(stats.spearmanr(one, other).statistic)


def test_spearman_interval_holds_the_true_correlation_nineteen_times_in_twenty():
    # The population value for normal pairs of correlation r is 6 / pi asin(r / 2).
    generator, r = torch.Generator().manual_seed(0), 0.8
    expected, inside = 6 / torch.pi * torch.asin(torch.tensor(r / 2)).item(), 0
    for _ in range(200):
        one, noise = torch.randn(2, 40, generator=generator)
        found = spearman(one.tolist(), (r * one + (1 - r**2) ** 0.5 * noise).tolist())
        inside += found.low <= expected <= found.high
    assert 0.9 < inside / 200 < 0.99


def test_spearman_of_few_pairs_is_refused():
    with pytest.raises(InputError, match="needs four pairs, got 3"):
        spearman([1, 2, 3], [1, 2, 3])


def test_aitchison_similarity_is_the_cosine_of_weighted_centred_log_ratios():
    generator = torch.Generator().manual_seed(0)
    one, other, weights = (torch.rand(50, generator=generator).double() for _ in range(3))
    weights = weights / weights.sum()
    means = [sum(w * x for w, x in zip(weights, part, strict=True)) for part in (one, other)]
    products = [
        sum(w * (x - a) * (y - b) for w, x, y in zip(weights, left, right, strict=True))
        for (left, a), (right, b) in (
            ((one, means[0]), (other, means[1])),
            ((one, means[0]), (one, means[0])),
            ((other, means[1]), (other, means[1])),
        )
    ]
    expected = products[0] / (products[1] * products[2]) ** 0.5
    torch.testing.assert_close(aitchison_similarity(one, other, weights), expected)
    shifted = aitchison_similarity(one + 7, other - 3, weights)
    torch.testing.assert_close(shifted, expected)


def test_alignment_is_that_of_hooks(tiny):
    lens, ids, vector = random_lens(tiny), token_ids(), orthonormal(1)[0]
    (found,) = response_alignment(tiny, {"random": lens}, ids, [Directions(vector, 1)], "mean")

    def hook(_module, args):
        values = args[0] @ vector
        return (args[0] + (values.mean() - values)[..., None] * vector, *args[1:])

    states, clean = tiny.residual_stream(ids), logits(tiny, ids)
    handle = tiny.model.transformer.h[1].register_forward_pre_hook(hook)
    after, changed = tiny.residual_stream(ids), logits(tiny, ids)
    handle.remove()
    with torch.no_grad():
        stimulus = lens(after[1], 1) - lens(states[1], 1)
    expected = aitchison_similarity(stimulus, changed - clean, clean.softmax(-1)).mean()
    assert found.similarity.value == pytest.approx(expected.item(), abs=1e-4)
    assert found[:3] == ("random", "resid_pre", 1)


def test_alignment_at_the_last_state_is_one(tiny):
    target = Directions(orthonormal(2), -1)
    (found,) = response_alignment(tiny, {"random": random_lens(tiny)}, token_ids(), [target])
    assert found.layer == 3
    assert found.similarity.value == pytest.approx(1, abs=1e-5)


def test_inversion_finds_a_state_with_the_distribution_of_another(tiny):
    lens, ids = random_lens(tiny), token_ids(1, 3)
    with torch.no_grad():
        wanted = lens(tiny.residual_stream(ids)[1][0], 1)
        found = lens.invert(wanted, 1)
        again = kl_divergence(log_probs(wanted), log_probs(lens(found.hidden, 1)))
    torch.testing.assert_close(found.kl_nats, again)
    assert (found.kl_nats < 1e-3).all()
    assert (found.steps > 1).all()


def test_inversion_of_a_linear_lens_gives_the_state_back(tiny):
    weight = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)).double() / 4
    lens = LogitLens(Unembedding(nn.Sequential(), weight, None), tiny.identity)
    hidden = torch.randn(16, generator=torch.Generator().manual_seed(1)).double()
    found = lens.invert(lens(hidden, 1), 1)
    assert found.kl_nats < 1e-9
    torch.testing.assert_close(found.hidden, hidden, atol=1e-3, rtol=1e-3)


def test_inversion_with_a_penalty_stays_near_its_start(tiny):
    lens, ids = random_lens(tiny), token_ids(1, 2)
    start = tiny.residual_stream(ids)[1][0]
    wanted = torch.full((2, 4096), -torch.inf)
    wanted[:, 7] = 0  # one token has all the probability
    free, held = (lens.invert(wanted, 1, start=start, penalty=p) for p in (0.0, 10.0))
    distances = [(one.hidden - start).norm(dim=1) for one in (free, held)]
    assert (distances[1] < distances[0]).all()
    assert (free.kl_nats < held.kl_nats).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": torch.zeros(100), "layer": 1}, "expected logits of 4096 tokens"),
        ({"logits": torch.zeros(4096), "layer": 9}, "layer must be between 0 and 3"),
        ({"logits": torch.zeros(4096), "layer": 1, "penalty": -1.0}, "penalty must be 0 or more"),
        (
            {"logits": torch.zeros(2, 4096), "layer": 1, "start": torch.zeros(16)},
            r"expected a start of shape \(2, 16\)",
        ),
        ({"logits": torch.full((4096,), -torch.inf), "layer": 1}, "finite, or -inf for some"),
    ],
)
def test_inversion_that_is_impossible_is_refused(tiny, settings, message):
    with pytest.raises(InputError, match=message):
        random_lens(tiny).invert(**settings)


def test_scatter_shows_every_target_and_the_correlation():
    pairs = [(1.0, 0.1), (0.5, 0.2), (0.2, 0.02), (0.1, 0.01)]
    lens, model = ([Estimate(one[side], 0.01) for one in pairs] for side in (0, 1))
    effects = CausalEffects(["a", "b", "c", "d"], lens, model)
    (axes,) = effects.scatter().axes
    shown = {(*line.get_xdata(), *line.get_ydata()) for line in axes.lines}
    assert set(pairs) <= shown
    assert axes.get_title() == "Spearman's ρ = 0.80 (-0.82 to 1.00)"
    table = effects.to_dataframe()
    assert list(zip(table.lens_nats, table.model_nats, strict=True)) == pairs


def test_plots_by_layer_and_by_direction_show_every_value():
    alignments = [
        Alignment(lens, "resid_pre", layer, Estimate(layer / 10, 0.01))
        for lens in ("tuned", "logit")
        for layer in (2, 1)
    ]
    (axes,) = plots.alignment_by_layer(alignments).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 0.1], [2, 0.2]]] * 2
    values = torch.tensor([0.5, 0.25])
    basis = CausalBasis(
        torch.eye(2), values, values / 10, torch.ones(2), 1, "resid_pre", "mean", "tiny", 8
    )
    (axes,) = plots.influences({"tuned": basis}).axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.25]]
