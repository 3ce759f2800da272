import pytest
import torch
from conftest import make_gpt2, random_lens

from tunedlens import FrozenModel, InputError, LogitLens, TunedLens
from tunedlens.engine.objective import LensKL


@pytest.fixture
def states(tiny):
    return tiny.residual_stream(torch.arange(40).view(2, 20))


def test_logit_lens_is_final_norm_and_unembedding(tiny, states):
    gpt2 = tiny.model
    expected = gpt2.lm_head(gpt2.transformer.ln_f(states[1]))
    assert torch.allclose(LogitLens.from_model(tiny)(states[1], 1), expected, atol=1e-5)


def test_new_tuned_lens_equals_logit_lens(tiny, states):
    logit, tuned = LogitLens.from_model(tiny), TunedLens.from_model(tiny)
    for layer, hidden in enumerate(states):
        assert torch.equal(tuned(hidden, layer), logit(hidden, layer))


@pytest.mark.parametrize("make", [LogitLens.from_model, random_lens])
def test_lens_at_the_last_state_gives_the_models_own_logits(tiny, states, make):
    expected = tiny.model(torch.arange(40).view(2, 20)).logits
    assert torch.allclose(make(tiny)(states[-1], 3), expected, atol=1e-5)


def test_tuned_lens_applies_its_affine_translator_in_residual_form(tiny, states):
    lens = random_lens(tiny)
    weight, bias = lens.translator(2).weight, lens.translator(2).bias
    h = states[2].double()
    expected = h + torch.einsum("...i,oi->...o", h, weight.double()) + bias.double()
    assert torch.allclose(lens.transform_hidden(states[2], 2).double(), expected, atol=1e-5)


def test_negative_layers_count_from_the_end(tiny, states):
    lens = random_lens(tiny)
    for layer, hidden in enumerate(states):
        assert torch.equal(lens(hidden, layer - 4), lens(hidden, layer))


@pytest.mark.parametrize("layer", [4, -5, 100])
def test_layer_out_of_range_is_refused(tiny, states, layer):
    with pytest.raises(InputError, match=f"between 0 and 3 .*got {layer}"):
        TunedLens.from_model(tiny)(states[0], layer)


def test_hidden_states_of_another_width_are_refused(tiny):
    with pytest.raises(InputError, match=r"16 dimensions, got \(2, 8\)"):
        LogitLens.from_model(tiny)(torch.zeros(2, 8), 0)


def test_parameters_are_those_of_the_translators_and_nothing_else(tiny):
    names = {name for name, _ in TunedLens.from_model(tiny).named_parameters()}
    expected = {
        f"translators.resid_pre.{i}.{part}" for i in range(3) for part in ("weight", "bias")
    }
    assert names == expected
    assert TunedLens.from_model(tiny).state_dict().keys() == expected


def test_gradients_reach_every_translator_and_nothing_of_the_model(tiny, states):
    lens = TunedLens.from_model(tiny)
    *hidden, final = (state.flatten(0, 1) for state in states)
    translated = torch.stack([lens.transform_hidden(h, i) for i, h in enumerate(hidden)])
    LensKL(tiny.unembedding)(translated, final).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in lens.parameters())
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_translators_are_float32_for_a_half_precision_model(tokenizer):
    model = FrozenModel(make_gpt2().bfloat16(), tokenizer)
    lens = TunedLens.from_model(model)
    hidden = model.residual_stream(torch.arange(8)[None])[1]
    assert hidden.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in lens.parameters()} == {torch.float32}
    assert lens(hidden, 1).dtype == torch.float32


def test_lens_shares_the_memory_of_the_unembedding(tiny):
    lens = LogitLens.from_model(tiny)
    assert lens.unembedding.weight.data_ptr() == tiny.model.lm_head.weight.data_ptr()


def test_moving_a_lens_leaves_the_model_and_other_lenses_where_they_are(tiny, states):
    other = LogitLens.from_model(tiny)
    moved = random_lens(tiny).double()
    assert tiny.model.transformer.ln_f.weight.dtype == torch.float32
    assert tiny.unembedding.weight.dtype == other.unembedding.weight.dtype == torch.float32
    assert moved(states[1], 1).dtype == torch.float64
    assert torch.allclose(moved(states[1], 1).float(), random_lens(tiny)(states[1], 1), atol=1e-4)
