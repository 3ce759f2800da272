import pytest
import torch
from conftest import make_llama

from tunedlens import FrozenModel, InputError, neurons
from tunedlens.tokenizer import shown

TEXT = "def f(x):\n    return"


@pytest.fixture
def llama(tokenizer):
    return FrozenModel(make_llama(), tokenizer, name="llama")


def by_hand(model, text, layer):
    """Coefficients and output vectors, written down for each architecture."""
    ids = model.encode(text)
    hidden = {}
    block = model.blocks[layer]
    norm = block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm
    handle = norm.register_forward_hook(lambda _m, _a, output: hidden.update(x=output))
    model.model(ids)
    handle.remove()
    x, mlp = hidden["x"][0], block.mlp
    if hasattr(mlp, "c_fc"):
        return mlp.act(mlp.c_fc(x)), mlp.c_proj.weight
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_neurons_and_what_they_promote_are_those_of_the_definition(request, name):
    model = request.getfixturevalue(name)
    coefficients, vectors = by_hand(model, TEXT, 1)
    table = neurons(model, TEXT, 1, position=-2, k=4, promoted=3)
    here = coefficients[-2]
    best = here.abs().topk(4).indices
    assert table.index.tolist() == best.tolist()
    assert table["coefficient", ""].tolist() == pytest.approx(here[best].tolist(), rel=1e-4)
    for neuron in best.tolist():
        logits = model.model.lm_head.weight @ (here[neuron] * vectors[neuron])
        top = logits.topk(3)
        line = table.loc[neuron]
        assert [line[place, "token"] for place in (1, 2, 3)] == [
            shown(model.tokenizer, token) for token in top.indices.tolist()
        ]
        expected = (top.values - logits.mean()).tolist()
        assert [line[place, "logit"] for place in (1, 2, 3)] == pytest.approx(expected, rel=1e-3)


def test_mlp_that_is_no_sum_of_neurons_is_refused(tiny):
    tiny.blocks[1].mlp.register_forward_hook(lambda _m, _a, output: 2 * output)
    with pytest.raises(InputError, match="block 1 of tiny is not a sum of output vectors"):
        neurons(tiny, TEXT, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": ""}, "no tokens"),
        ({"layer": 3}, "layer must be between -3 and 2"),
        ({"position": 99}, "position must be between"),
        ({"k": 65}, "k must be between 1 and 64"),
        ({"promoted": 0}, "promoted must be between 1 and 4096"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, options, words):
    settings = {"text": TEXT, "layer": 1} | options
    with pytest.raises(InputError, match=words):
        neurons(tiny, settings.pop("text"), settings.pop("layer"), **settings)
