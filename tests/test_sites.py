"""Translators at sites within a block: trained, saved, evaluated and read beside the stream."""

import dataclasses
import json

import pytest
import torch
from conftest import SMALL, make_gpt2, random_lens, short_run
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tunedlens import (
    FrozenModel,
    InputError,
    LogitLens,
    ModelConfig,
    ScoringConfig,
    TunedLens,
    export_lens,
    load_lens,
    load_model,
    score_lenses,
    train,
    trajectory,
)
from tunedlens.engine import LensKL, accumulate_gradient
from tunedlens.evaluation import Evaluation
from tunedlens.model import HookPoint

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out")


@pytest.fixture
def config(tiny_folder, text_file):
    return short_run(
        tiny_folder,
        text_file,
        tokens=3200,
        init_tokens=512,
        evaluate_tokens=150,
        sites="resid_mid,mlp_out",
    )


def lens_at(model, sites, scale=0.1):
    torch.manual_seed(0)
    lens = TunedLens.from_model(model, sites)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.normal_(0.0, scale)
    return lens


def test_states_at_points_are_those_of_the_sites(tiny):
    ids = torch.tensor([[5, 7, 11]])
    points = [HookPoint("mlp_out", 1), HookPoint("resid_pre", 3), HookPoint("resid_mid", 0)]
    sites = tiny.sites(ids)
    for point, state in zip(points, tiny.states_at(points, ids), strict=True):
        assert torch.equal(state, sites[point.site][point.layer])


def test_translators_are_keyed_by_site_and_layer(tiny):
    lens = TunedLens.from_model(tiny, ["mlp_out", "resid_pre"])
    assert lens.sites == ("resid_pre", "mlp_out")
    assert list(lens.translators.state_dict())[::2] == [
        *(f"resid_pre.{layer}.weight" for layer in range(3)),
        *(f"mlp_out.{layer}.weight" for layer in range(3)),
    ]
    hidden = torch.randn(2, 16)
    nn.init.normal_(lens.translator(1, "mlp_out").bias)
    shift = lens.transform_hidden(hidden, 1, "mlp_out") - hidden
    assert torch.allclose(shift, lens.translator(1, "mlp_out").bias.expand(2, -1), atol=1e-6)
    assert torch.equal(lens.transform_hidden(hidden, 1), hidden)


def test_state_that_leaves_a_block_has_the_translator_of_the_next(tiny):
    lens, hidden = random_lens(tiny), torch.randn(2, 16)
    for layer in range(3):
        expected = lens.transform_hidden(hidden, layer + 1)
        assert torch.equal(lens.transform_hidden(hidden, layer, "resid_post"), expected)


def test_gradients_at_every_site_are_those_of_autograd(tiny):
    lens = lens_at(tiny, SITES)
    ids = torch.tensor([[5, 7, 11, 13]])
    points = [*lens.points, HookPoint("resid_pre", 3)]
    states = [state[0] for state in tiny.states_at(points, ids)]
    objective = LensKL(tiny.unembedding)
    kl = accumulate_gradient(lens, states, objective)
    found = [parameter.grad.clone() for parameter in lens.parameters()]
    lens.zero_grad()
    p = tiny.unembedding(states[-1]).log_softmax(-1)
    total = torch.zeros(())
    for index, (point, state) in enumerate(zip(lens.points, states, strict=False)):
        q = lens(state, point.layer, point.site).log_softmax(-1)
        mean = (p.exp() * (p - q)).sum(-1).mean()
        assert torch.allclose(kl[index], mean, atol=1e-5)
        total = total + mean
    total.backward()
    for parameter, gradient in zip(lens.parameters(), found, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_run_with_sites_trains_saves_and_evaluates_all_of_them(config, tmp_path):
    evaluation = train(config, tmp_path / "run")
    names = [
        f"{lens}{site}" for lens in ("logit", "tuned") for site in ("", " resid_mid", " mlp_out")
    ]
    assert evaluation.lenses == names
    for site in ("", " resid_mid", " mlp_out"):
        logit, tuned = (evaluation.by_layer(f"{k}{site}", "kl_nats") for k in ("logit", "tuned"))
        assert all(ours.value < theirs.value for ours, theirs in zip(tuned, logit, strict=True)), (
            site
        )
    manifest = json.loads((tmp_path / "run" / "config.json").read_text())
    assert manifest["sites"] == ["resid_pre", "resid_mid", "mlp_out"]
    model = load_model(config.model.model, device="cpu")
    lens = load_lens(tmp_path / "run", model)
    assert lens.sites == ("resid_pre", "resid_mid", "mlp_out")
    assert all(translator.weight.any() for translator in lens.all_translators())
    again = Evaluation.from_json(json.loads(json.dumps(evaluation.to_json())))
    assert again.sites["tuned mlp_out"] == "mlp_out"


def test_stream_is_trained_as_without_further_sites(config, tmp_path):
    alone = dataclasses.replace(config, sites=None)
    lenses = []
    for name, one in (("both", config), ("alone", alone)):
        one = dataclasses.replace(one, validation_tokens=64)
        train(one, tmp_path / name)
        lenses.append(load_lens(tmp_path / name, load_model(config.model.model, device="cpu")))
    for layer in range(3):
        both, only = (lens.translator(layer).weight for lens in lenses)
        assert torch.allclose(both, only, rtol=1e-2, atol=1e-2 * float(only.detach().abs().max()))


def test_scores_at_a_site_are_those_of_a_loop(tiny):
    lens = lens_at(tiny, SITES)
    blocks = torch.randint(4096, (3, 16), generator=torch.Generator().manual_seed(0))
    lenses = {"logit": LogitLens.from_model(tiny), "tuned": lens}
    evaluation = score_lenses(tiny, lenses, blocks, ScoringConfig())
    sites = tiny.sites(blocks)
    p = tiny.model(blocks).logits[:, :-1].log_softmax(-1)
    for name, one in lenses.items():
        for site in SITES:
            column = name if site == "resid_pre" else f"{name} {site}"
            for layer in range(3):
                q = one(sites[site][layer], layer, site)[:, :-1].log_softmax(-1)
                expected = (p.exp() * (p - q)).sum(-1).mean()
                found = evaluation.by_layer(column, "kl_nats")[layer].value
                assert found == pytest.approx(float(expected.detach()), rel=1e-4)


def test_trajectory_reads_a_site_that_has_translators(tiny):
    lens = lens_at(tiny, SITES)
    read = trajectory(tiny, lens, "import os", sites=SITES)
    sites = tiny.sites(tiny.encode("import os"))
    for index, row in enumerate(read.rows[:-1]):
        log_probs = lens(sites[row.site][row.layer], row.layer, row.site)[0].log_softmax(-1)
        expected = log_probs.max(-1).values
        assert torch.allclose(
            read.predictions["tuned"].top_log_probs[index, :, 0], expected, atol=1e-4
        )


def test_sites_that_a_lens_or_a_model_does_not_have_are_refused(tiny, tokenizer, config, tmp_path):
    with pytest.raises(InputError, match="no translators for resid_mid; train it with --sites"):
        trajectory(tiny, random_lens(tiny), "import os", sites=["resid_mid"])
    with pytest.raises(InputError, match=r"translators at resid_pre, attn_out.* got 'resid_post'"):
        TunedLens.from_model(tiny, ["resid_post"])
    with pytest.raises(InputError, match="other libraries read translators at resid_pre only"):
        export_lens(lens_at(tiny, SITES), tmp_path / "export")
    with pytest.raises(InputError, match="not at mlp_out; train it with --sites mlp_out"):
        random_lens(tiny)(torch.zeros(1, 16), 0, "mlp_out")
    with pytest.raises(InputError, match=r"--sites must be some of .* got resid_post"):
        train(dataclasses.replace(config, sites="resid_post"), tmp_path / "run")
    with pytest.raises(InputError, match="--fit jacobian does not support further sites"):
        dataclasses.replace(config, fit="jacobian", tokens=None)
    torch.manual_seed(0)
    parallel = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, bos_token_id=0, eos_token_id=0))
    parallel.save_pretrained(tmp_path / "parallel")
    tokenizer.save_pretrained(tmp_path / "parallel")
    model = ModelConfig(model=str(tmp_path / "parallel"), device="cpu")
    with pytest.raises(InputError, match="side by side, so there is no resid_mid"):
        train(dataclasses.replace(config, model=model), tmp_path / "run")


def test_old_lens_without_a_list_of_sites_still_loads(tmp_path, tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer)
    lens = random_lens(model)
    lens.save(tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())
    del manifest["sites"]
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    assert load_lens(tmp_path, model).sites == ("resid_pre",)
