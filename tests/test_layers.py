"""Lenses with translators at some of the layers, from training to reports."""

import dataclasses
import json

import pytest
import torch
from conftest import random_lens, short_run
from safetensors.torch import load_file

from tunedlens import (
    EvaluateConfig,
    InputError,
    JacobianLens,
    LogitLens,
    ScoringConfig,
    TunedLens,
    compare,
    doctor,
    evaluate,
    export_lens,
    load_lens,
    load_model,
    score_lenses,
    train,
    trajectory,
    write_report,
)
from tunedlens.evaluation import Evaluation
from tunedlens.report.tables import kl_rows


@pytest.fixture
def config(tiny_folder, text_file):
    return short_run(
        tiny_folder, text_file, tokens=640, init_tokens=512, validation_tokens=64, layers="0,-1"
    )


def sparse_lens(model, layers, **settings):
    """A tuned lens with some of the translators of `random_lens`."""
    whole, lens = random_lens(model), TunedLens.from_model(model, layers=layers, **settings)
    for layer in layers:
        lens.translator(layer).load_state_dict(whole.translator(layer).state_dict())
    return lens


def random_blocks():
    return torch.randint(4096, (4, 16), generator=torch.Generator().manual_seed(0))


def test_lens_has_translators_at_its_layers_only(tiny, tmp_path):
    lens, whole = sparse_lens(tiny, [2, 0]), random_lens(tiny)
    assert [point.layer for point in lens.points] == [0, 2]
    lens.save(tmp_path)
    assert set(load_file(tmp_path / "lens.safetensors")) == {
        f"resid_pre.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")
    }
    again, hidden = load_lens(tmp_path, tiny), torch.randn(2, 16)
    assert again.layers == (0, 2)
    for layer in (0, 2, 3):
        assert torch.equal(again(hidden, layer), whole(hidden, layer))
    assert torch.equal(again(hidden, 1, "resid_post"), whole(hidden, 2))
    with pytest.raises(InputError, match="translators at layers 0, 2, not at layer 1; train it"):
        again(hidden, 1)
    with pytest.raises(InputError, match="not at layer 1"):
        again.generate(tiny, "import os", layer=1)


def test_run_with_layers_trains_them_as_a_run_with_all(config, tmp_path):
    model = load_model(config.model.model, device="cpu")
    lenses = []
    for name, layers in (("some", "0,-1"), ("all", None)):
        evaluation = train(dataclasses.replace(config, layers=layers), tmp_path / name)
        lenses.append(load_lens(tmp_path / name, model))
    some, _ = lenses
    assert some.layers == (0, 2)
    for layer in (0, 2):
        one, other = (lens.translator(layer).weight.detach() for lens in lenses)
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))
    manifest = json.loads((tmp_path / "some" / "config.json").read_text())
    assert manifest["config"]["layers"] == "0,2"
    kl = Evaluation.from_json(manifest["held_out"]).by_layer("tuned", "kl_nats")
    of_all = evaluation.by_layer("tuned", "kl_nats")
    assert [e.value for e in kl] == pytest.approx([of_all[i].value for i in (0, 2)], rel=1e-2)
    assert "- Layers: 0, 2." in (tmp_path / "some" / "README.md").read_text()


def test_run_with_layers_is_extended_and_starts_another(config, tmp_path):
    train(config, tmp_path / "run")
    train(dataclasses.replace(config, tokens=1280), tmp_path / "run", resume=True)
    model = load_model(config.model.model, device="cpu")
    assert load_lens(tmp_path / "run", model).layers == (0, 2)
    again = dataclasses.replace(config, layers="2", init=str(tmp_path / "run"))
    train(again, tmp_path / "again")
    assert load_lens(tmp_path / "again", model).layers == (2,)
    with pytest.raises(InputError, match=r"resid_pre\.1\.bias is missing"):
        train(dataclasses.replace(again, layers=None), tmp_path / "third")


def test_means_and_differences_are_over_the_layers_that_lenses_have(tiny, tmp_path):
    lenses = {
        "logit": LogitLens.from_model(tiny),
        "one": sparse_lens(tiny, [0, 2]),
        "two": random_lens(tiny, seed=1),
        "three": sparse_lens(tiny, [1]),
    }
    config = ScoringConfig(metrics="all", by_position=True, transfer=True)
    found = score_lenses(tiny, lenses, random_blocks(), config)
    whole = {name: random_lens(tiny) for name in ("one", "three")} | {"two": lenses["two"]}
    expected = score_lenses(tiny, {"logit": lenses["logit"]} | whole, random_blocks(), config)
    layers = {"logit": [0, 1, 2], "one": [0, 2], "two": [0, 1, 2], "three": [1]}
    for name, own in layers.items():
        assert found.layers_of(name) == own
        for metric in ("kl_nats", "top1_agreement", "bias_nats", "calibration_error"):
            values = [expected.by_layer(name, metric)[layer].value for layer in own]
            assert [e.value for e in found.by_layer(name, metric)] == pytest.approx(values)
            assert found.of_lens(name, metric).value == pytest.approx(sum(values) / len(own))
    one, two = (expected.by_layer(name, "kl_nats") for name in ("one", "two"))
    shared = [two[layer].value - one[layer].value for layer in (0, 2)]
    assert found.mean_difference("two", "one", "kl_nats").value == pytest.approx(sum(shared) / 2)
    assert [e.value for e in found.difference("two", "one", "kl_nats")] == pytest.approx(shared)
    with pytest.raises(InputError, match="no difference of three and one"):
        found.difference("three", "one", "kl_nats")
    for grids in (found.by_position, found.transfer):
        assert set(grids["one"]["kl_nats"].values[1]) == {None}
    assert found.transfer["one"]["kl_nats"].values[0][2] == pytest.approx(
        expected.transfer["one"]["kl_nats"].values[0][2]
    )
    assert [row[2] == "–" for row in kl_rows(found)[1:]] == [False, True, False, False]
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found
    write_report(found, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "(at 0, 2)" in report


def test_prediction_depth_is_the_first_own_layer_from_which_the_top_token_stays(tiny):
    blocks, lens = random_blocks(), sparse_lens(tiny, [0, 2])
    found = score_lenses(tiny, {"tuned": lens}, blocks, ScoringConfig())
    states = tiny.residual_stream(blocks)
    model = tiny.model(blocks).logits[:, :-1].argmax(-1)
    agrees = [lens(states[layer], layer)[:, :-1].argmax(-1) == model for layer in (0, 2)]
    depth = torch.full(model.shape, 3)
    depth[agrees[1]] = 2
    depth[agrees[1] & agrees[0]] = 0
    expected = [float((depth == layer).double().mean()) for layer in (0, 2, 3)]
    shares = [e.value for e in found.by_layer("tuned", "prediction_depth")]
    assert shares == pytest.approx(expected)
    assert found.of_lens("tuned", "mean_prediction_depth").value == pytest.approx(
        float(depth.double().mean())
    )


def test_logit_lens_is_scored_where_the_others_have_translators(tiny):
    lenses = {"logit": LogitLens.from_model(tiny), "tuned": sparse_lens(tiny, [1])}
    assert score_lenses(tiny, lenses, random_blocks()).layers_of("logit") == [1]
    alone = score_lenses(tiny, {"logit": lenses["logit"]}, random_blocks())
    assert alone.layers_of("logit") == [0, 1, 2]


def test_saved_lens_is_evaluated_at_its_layers(config, tmp_path):
    train(dataclasses.replace(config, fit="closed-form", tokens=None), tmp_path / "run")
    found = evaluate(EvaluateConfig(lenses=(str(tmp_path / "run"),), tokens=60))
    assert [found.layers_of(lens) for lens in found.lenses] == [[0, 2], [0, 2]]


def test_trajectory_has_the_rows_that_all_lenses_read(tiny):
    lens = sparse_lens(tiny, [0, 2])
    read = trajectory(tiny, {"logit": LogitLens.from_model(tiny), "tuned": lens}, "import os")
    assert read.row_names == ["0", "2", "model"]
    whole = trajectory(tiny, random_lens(tiny), "import os")
    ours, theirs = read.predictions["tuned"], whole.predictions["tuned"]
    assert torch.equal(ours.top_ids[1], theirs.top_ids[2])
    compared = compare(tiny, lens, "import os", baseline_lenses=sparse_lens(tiny, [1, 2]))
    assert compared.trajectory.row_names == compared.baseline.row_names == ["2", "model"]
    with pytest.raises(InputError, match="the lenses a, b have no layer with"):
        trajectory(tiny, {"a": lens, "b": sparse_lens(tiny, [1])}, "import os")


def test_jacobian_lens_has_the_layers_that_were_asked_for(config, tmp_path):
    config = dataclasses.replace(config, fit="jacobian", tokens=None, init_tokens=64)
    for name, layers in (("some", "2,1"), ("all", None)):
        train(dataclasses.replace(config, layers=layers), tmp_path / name)
    model = load_model(config.model.model, device="cpu")
    some, whole = (JacobianLens.load(tmp_path / name, model) for name in ("some", "all"))
    assert some.layers == (1, 2)
    for layer in some.layers:
        assert torch.allclose(some.translator(layer).weight, whole.translator(layer).weight)
    export_lens(some, tmp_path / "lens.pt")
    assert load_lens(tmp_path / "lens.pt", model).layers == (1, 2)


def test_doctor_examines_the_layers_that_there_are(tiny, tmp_path):
    TunedLens.from_model(tiny, layers=[0, 2]).save(tmp_path / "lens")
    check = doctor(tiny, tmp_path / "lens").checks[-1]
    assert check.passed
    assert check.name == "the lens is closer to the model than the logit lens"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0,3", r"--layers must be between 0 and 2 \(or -3 and -1, from the end\).* got 3"),
        ("-4", "got -4"),
        ("0,x", r"--layers must be numbers separated by commas, like 0,6,-1; got '0,x'"),
    ],
)
def test_layers_that_a_model_does_not_have_are_refused(config, tmp_path, layers, message):
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, layers=layers), tmp_path / "run")


def test_format_that_needs_all_layers_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"needs translators at all 3 layers; .* at 0, 2"):
        export_lens(sparse_lens(tiny, [0, 2]), tmp_path / "export")
    with pytest.raises(InputError, match="between 0 and 2 for tiny, got 3"):
        TunedLens.from_model(tiny, layers=[3])


def test_lens_with_the_name_of_another_one_at_a_site_is_refused(tiny):
    two = TunedLens.from_model(tiny, sites=["resid_pre", "resid_mid"])
    lenses = {"tuned": two, "tuned resid_mid": random_lens(tiny)}
    with pytest.raises(InputError, match="two lenses are called tuned resid_mid"):
        score_lenses(tiny, lenses, random_blocks())


def test_jacobian_at_the_embeddings_alone_is_not_exported(tiny, tmp_path):
    with pytest.raises(InputError, match="a translator at layer 0 only"):
        export_lens(JacobianLens.from_model(tiny, layers=[0]), tmp_path / "lens.pt")
