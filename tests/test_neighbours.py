"""Lenses in other libraries give the logits that they give here.

The numbers are compared where the libraries are installed; the index mapping always is.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2

from tunedlens import FrozenModel, InputError, TunedLens, builtin

ROOT = Path(__file__).parents[1]
TEXT = "import os\n\ndef main():\n    path = os.path.join(root, name)\n"

LABELS = ["0_pre", "1_pre", "2_pre", "final_post"]
LABELS_WITH_MID = ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
"""What TransformerLens 4.3.0 calls the entries of the stack of a model with three blocks."""


def lens_of(model, sites=("resid_pre", "resid_mid"), seed=0):
    """A lens whose translators are all different."""
    torch.manual_seed(seed)
    lens = TunedLens.from_model(model, sites)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.normal_(0.0, 0.1)
    return lens


def expected_state(lens, label, state):
    """What the lens makes of an entry, by its name and the definition of a translator."""
    if label == "final_post":
        return state
    layer, site = label.split("_")
    translator = lens.translator(int(layer), f"resid_{site}")
    return state + state @ translator.weight.T + translator.bias


@pytest.mark.parametrize(("incl_mid", "labels"), [(False, LABELS), (True, LABELS_WITH_MID)])
def test_entries_of_transformer_lens_get_the_translator_of_their_name(tiny, incl_mid, labels):
    lens = lens_of(tiny)
    translate = lens.as_transformer_lens(incl_mid=incl_mid)
    for index, label in enumerate(labels):
        entry = torch.randn(2, 5, 16)
        torch.testing.assert_close(translate(entry, index), expected_state(lens, label, entry))


def test_entry_that_does_not_exist_is_refused(tiny):
    with pytest.raises(InputError, match="between 0 and 3, got 4; use the same incl_mid="):
        lens_of(tiny).as_transformer_lens()(torch.randn(1, 2, 16), 4)
    with pytest.raises(InputError, match="between 0 and 6, got -1"):
        lens_of(tiny).as_transformer_lens(incl_mid=True)(torch.randn(1, 2, 16), -1)


@pytest.mark.parametrize(
    ("sites", "index", "missing"),
    [
        (("resid_pre",), 3, "entry 3, resid_mid of block 1, only for resid_pre of blocks 0, 1, 2;"),
        (("resid_mid",), 4, "entry 4, resid_pre of block 2, only for resid_mid of blocks 0, 1, 2;"),
    ],
)
def test_entry_without_a_translator_is_named(tiny, sites, index, missing):
    translate = lens_of(tiny, sites).as_transformer_lens(incl_mid=True)
    entry = torch.randn(1, 2, 16)
    with pytest.raises(InputError, match=missing):
        translate(entry, index)
    assert torch.equal(translate(entry, 6), entry)  # the last state needs none


def test_centred_states_are_refused_when_two_have_come(tiny):
    def centred():
        state = torch.randn(1, 1, 16, dtype=torch.float64)
        return (state - state.mean(-1, keepdim=True)).float()

    translate = lens_of(tiny).as_transformer_lens()
    translate(centred(), 0)
    translate(torch.randn(1, 1, 16), 1)  # what came before was chance
    translate(centred(), 0)
    with pytest.raises(InputError, match="centred the weights"):
        translate(centred(), 1)


def test_translated_entry_keeps_the_dtype_of_the_stack(tiny):
    translate = lens_of(tiny).as_transformer_lens()
    assert translate(torch.randn(1, 2, 16, dtype=torch.bfloat16), 0).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def lens(model):
    return TunedLens.load(ROOT / "checkpoints" / "embedded", model)


@pytest.fixture(scope="module")
def ids(model):
    return model.encode(TEXT)


def boot_bridge(folder=builtin.FOLDER):
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    return bridge.TransformerBridge.boot_transformers(str(folder), device="cpu")


def read_by_transformer_lens(bridge, ids, **options):
    """Logits of all positions by entry, and the entries' names."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    result = analysis.logit_lens(bridge, ids, positions=None, **options)
    return result.values, result.labels


def own_logits(model, lens, ids):
    return torch.stack([lens(h, i) for i, h in enumerate(model.residual_stream(ids))]).detach()


def test_transformer_lens_gives_our_logits(model, lens, ids):
    found, _ = read_by_transformer_lens(boot_bridge(), ids, lens=lens.as_transformer_lens())
    torch.testing.assert_close(found, own_logits(model, lens, ids), atol=1e-4, rtol=0)


def test_transformer_lens_gives_our_logits_between_attention_and_mlp(tiny_folder, tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer, name="tiny")
    lens, ids = lens_of(model), model.encode(TEXT)[:, :16]
    found, labels = read_by_transformer_lens(
        boot_bridge(tiny_folder), ids, incl_mid=True, lens=lens.as_transformer_lens(incl_mid=True)
    )
    assert labels == LABELS_WITH_MID
    states = model.sites(ids)
    for logits, label in zip(found, labels, strict=True):
        layer, site = ("3", "pre") if label == "final_post" else label.split("_")
        expected = lens(states[f"resid_{site}"][int(layer)], int(layer), f"resid_{site}")
        torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=0)


def test_compatibility_mode_without_processing_changes_nothing(model, lens, ids):
    bridge = boot_bridge()
    bridge.enable_compatibility_mode(no_processing=True)
    found, _ = read_by_transformer_lens(bridge, ids, lens=lens.as_transformer_lens())
    torch.testing.assert_close(found, own_logits(model, lens, ids), atol=1e-4, rtol=0)


def test_folded_norms_and_value_biases_change_nothing(model, lens, ids):
    bridge = boot_bridge()
    bridge.enable_compatibility_mode(center_writing_weights=False, center_unembed=False)
    found, _ = read_by_transformer_lens(bridge, ids, lens=lens.as_transformer_lens())
    torch.testing.assert_close(found, own_logits(model, lens, ids), atol=1e-4, rtol=0)


def test_centred_unembedding_changes_no_log_probability(model, lens, ids):
    bridge = boot_bridge()
    bridge.enable_compatibility_mode(center_writing_weights=False)
    found, _ = read_by_transformer_lens(bridge, ids, lens=lens.as_transformer_lens())
    expected = own_logits(model, lens, ids)
    assert (found - expected).abs().max() > 1
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_centred_writing_weights_are_refused(lens, ids, n_tokens):
    bridge = boot_bridge()
    bridge.enable_compatibility_mode()
    with pytest.raises(InputError, match=r"no_processing=True"):
        read_by_transformer_lens(bridge, ids[:, :n_tokens], lens=lens.as_transformer_lens())


def test_nnsight_gives_our_states_and_logits(model, lens, ids):
    nnsight = pytest.importorskip("nnsight")
    traced = nnsight.TransformersModel(model.model, tokenizer=model.tokenizer)
    with traced.trace(ids):
        outputs, logits = nnsight.save([]), nnsight.save([])
        for layer, block in enumerate(traced.transformer.h):
            outputs.append(block.output)
            logits.append(lens(block.output, layer, "resid_post"))
    assert all(isinstance(output, torch.Tensor) for output in outputs)
    torch.testing.assert_close(outputs, model.residual_stream(ids)[1:])
    expected = list(own_logits(model, lens, ids)[1:])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def snippets():
    """Library, code and output of the page's snippets."""
    page = (ROOT / "docs" / "neighbours.md").read_text()
    found = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.S)
    assert len(found) == 2
    return [pytest.param(*snippet, id=name) for snippet, name in zip(found, NAMES, strict=True)]


NAMES = ("transformer_lens", "nnsight")


@pytest.mark.parametrize(("code", "expected"), snippets())
def test_snippet_runs_and_prints_what_the_page_says(code, expected, monkeypatch, tmp_path):
    pytest.importorskip(next(name for name in NAMES if name in code))
    page = tmp_path / "snippet.py"  # nnsight reads the source of a trace from a file
    page.write_text(code)
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, str(page), "exec"), {})
    assert printed.getvalue() == expected
