"""Lenses in the formats of other libraries.

`scripts/record_foreign_lenses.py` made the files in `data/foreign_lenses` with those libraries, and
checks in them what this project writes.
"""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_gpt2
from safetensors.torch import load_file

from tunedlens import (
    CorpusConfig,
    EvaluateConfig,
    FrozenModel,
    InputError,
    JacobianLens,
    TunedLens,
    builtin,
    checkpoint,
    doctor,
    evaluate,
    export_lens,
    load_lens,
    load_model,
)
from tunedlens.checkpoint import describe_lens

DATA = Path(__file__).parent / "data" / "foreign_lenses"
IDS = torch.tensor([[5, 90, 33, 200, 7, 7, 110, 64, 12, 250, 1, 77]])
RELEASES = ("0.0.5", "0.1.0", "0.2.0")
JACOBIAN = "transformer-lens-4.3.0.pt"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*farther from"),
    pytest.mark.filterwarnings("ignore:.*has no Jacobian for layer 0"),
]


@pytest.fixture(scope="module")
def small():
    """The GPT-2 of 3 layers of width 8 that the recorded lenses were made for."""
    return load_model(DATA / "model", device="cpu")


@pytest.fixture
def copy(tmp_path):
    """Copy a recorded lens to where it can be changed."""

    def make(name):
        source, target = DATA / name, tmp_path / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return target

    return make


def changed_pt(path, **changes):
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def assert_logits(lens, model, recorded):
    assert recorded
    states = model.residual_stream(IDS)
    for layer, expected in recorded.items():
        with torch.no_grad():
            logits = lens(states[int(layer)], int(layer))[0, -len(expected) :]
        assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("release", RELEASES)
def test_lens_of_tuned_lens_gives_its_logits(small, release):
    folder = DATA / f"tuned-lens-{release}"
    lens = load_lens(folder, small)
    assert type(lens) is TunedLens
    recorded = load_file(folder / "logits.safetensors")
    assert set(recorded) == {"0", "1", "2"}
    assert_logits(lens, small, recorded)


def test_lens_of_transformer_lens_gives_its_logits_one_state_after_its_block(small):
    lens = load_lens(DATA / JACOBIAN, small)
    assert type(lens) is JacobianLens
    recorded = load_file(DATA / JACOBIAN.replace(".pt", ".safetensors"))
    assert set(recorded) == {"1", "2"}
    assert_logits(lens, small, recorded)


def test_published_jacobian_lens_has_no_translator_for_the_embeddings(small):
    lens = load_lens(DATA / JACOBIAN, small)
    assert lens.layers == (1, 2)
    with pytest.raises(InputError, match="translators at layers 1, 2, not at layer 0"):
        lens.transform_hidden(small.residual_stream(IDS)[0], 0)


def test_jacobian_lens_that_is_written_back_has_the_same_layers(small, tmp_path):
    export_lens(load_lens(DATA / JACOBIAN, small), tmp_path / "back.pt")
    lens = load_lens(tmp_path / "back.pt", small)
    assert lens.layers == (1, 2)
    assert_logits(lens, small, load_file(DATA / JACOBIAN.replace(".pt", ".safetensors")))


def test_sparse_file_of_jacobians_gives_a_sparse_lens(small, copy):
    path = copy(JACOBIAN)
    jacobian = torch.load(path, weights_only=True)["J"][1].float()
    lens = load_lens(changed_pt(path, J={1: jacobian}, source_layers=[1]), small)
    assert lens.layers == (2,)
    state = small.residual_stream(IDS)[2]
    torch.testing.assert_close(lens.transform_hidden(state, 2), state @ jacobian.T)


@pytest.mark.parametrize("release", RELEASES)
def test_lens_of_tuned_lens_is_of_its_kind_and_for_its_model(release):
    about = describe_lens(DATA / f"tuned-lens-{release}")
    assert about["lens"] == "tuned"
    assert about["model"] == {"name": "tiny", "revision": None}
    assert len(about["lens_sha256"]) == 64


def test_exported_tuned_lens_reads_back_bit_equal_without_a_warning(tmp_path):
    model = load_model(device="cpu")
    lens = TunedLens.load(builtin.FOLDER.parents[2] / "checkpoints" / "embedded", model)
    export_lens(lens, tmp_path / "lens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = TunedLens.load(tmp_path / "lens", model)
    for name, value in lens.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_exported_tuned_lens_has_the_config_of_tuned_lens(small, tmp_path):
    export_lens(TunedLens.from_model(small), tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((DATA / "tuned-lens-0.2.0" / "config.json").read_text())
    assert ours.keys() == theirs.keys()
    assert ours | {"unembed_hash": 0, "base_model_name_or_path": 0} == theirs | {
        "unembed_hash": 0,
        "base_model_name_or_path": 0,
    }


def test_exported_jacobian_lens_reads_back_and_has_the_keys_of_transformer_lens(small, tmp_path):
    lens = JacobianLens.from_jacobians(small, torch.randn(3, 8, 8))
    export_lens(lens, tmp_path / "lens.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = JacobianLens.load(tmp_path / "lens.pt", small)
    for layer in range(3):
        torch.testing.assert_close(again.translator(layer).weight, lens.translator(layer).weight)
    ours = torch.load(tmp_path / "lens.pt", weights_only=True)
    theirs = torch.load(DATA / JACOBIAN, weights_only=True)
    assert theirs.keys() <= ours.keys()
    assert ours["J"].keys() == theirs["J"].keys() == {0, 1}
    assert ours["metadata"]["target_layer"] == theirs["metadata"]["target_layer"] == 2
    torch.testing.assert_close(ours["J"][0], lens.translator(1).weight + torch.eye(8))


@pytest.mark.parametrize("name", ["tuned-lens-0.2.0", "tuned-lens-0.0.5", JACOBIAN])
def test_file_that_would_run_code_is_refused_and_runs_nothing(small, copy, tmp_path, name):
    path = copy(name)
    mark = tmp_path / "ran"
    file = path / "params.pt" if path.is_dir() else path
    file.write_bytes(pickle.dumps({"J": Malicious(mark), "0.weight": Malicious(mark)}))
    for read in (lambda: load_lens(path, small), lambda: describe_lens(file)):
        with pytest.raises(InputError, match="never loaded"):
            read()
    torch.save({"J": Malicious(mark), "0.weight": Malicious(mark)}, file)
    with pytest.raises(InputError, match="never loaded"):
        load_lens(path, small)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))  # what a careless reader would have done
    assert mark.exists()


def test_lens_for_another_model_of_the_same_shape_draws_a_warning(small):
    with pytest.warns(UserWarning, match="farther from .* than the logit lens on a short text"):
        load_lens(DATA / "tuned-lens-0.2.0", small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lens(DATA / "tuned-lens-0.2.0", small, check=False)


def test_old_lens_with_another_unembedding_is_refused(small, copy):
    folder = copy("tuned-lens-0.0.5")
    changed_pt(folder / "params.pt", **{"unembedding.weight": torch.randn(257, 8)})
    with pytest.raises(InputError, match=r"another model than .*: unembedding.weight differs"):
        load_lens(folder, small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2.weight": None}, r"expected translators of 3 layers.*wrong: 2\.weight"),
        ({"3.weight": torch.zeros(8, 8)}, r"expected translators of 3 layers.*wrong: 3\.weight"),
        ({"1.weight": torch.zeros(8, 9)}, r"1\.weight in .* of shape \(8, 8\), got \(8, 9\)"),
        ({"1.bias": torch.full((8,), torch.nan)}, r"1\.bias in .* not finite"),
        ({"1.bias": torch.zeros(8, dtype=torch.int64)}, "must be a floating-point tensor"),
        ({"1.bias": "text"}, "must be a floating-point tensor .* got str"),
    ],
)
def test_params_that_do_not_fit_are_refused(small, copy, change, message):
    folder = copy("tuned-lens-0.2.0")
    changed_pt(folder / "params.pt", **change)
    with pytest.raises(InputError, match=message):
        load_lens(folder, small)


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_lens_with_a_strange_name_of_its_model_is_for_an_unknown_one(copy, name):
    path = copy("tuned-lens-0.2.0") / "config.json"
    changes = {"base_model_name_or_path": name, "model_config": name}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert describe_lens(path.parent)["model"]["name"] is None


@pytest.mark.parametrize("change", [{"extra_layers": 1}, {"reuse_unembedding": False}])
def test_old_lens_with_layers_of_its_own_is_refused(small, copy, change):
    path = copy("tuned-lens-0.0.5") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="additional layers or its own unembedding"):
        load_lens(path.parent, small)


@pytest.mark.parametrize("name", ["probe", "adapter"])
def test_names_of_the_oldest_lenses_are_read(small, copy, name):
    folder = copy("tuned-lens-0.0.5")
    content = torch.load(folder / "params.pt", weights_only=True)
    renamed = {key.replace("translator", name): value for key, value in content.items()}
    torch.save(renamed, folder / "params.pt")
    assert_logits(load_lens(folder, small), small, load_file(folder / "logits.safetensors"))


def test_lens_without_biases_has_none(small, copy):
    folder = copy("tuned-lens-0.2.0")
    changed_pt(folder / "params.pt", **{f"{layer}.bias": None for layer in range(3)})
    assert not any(one.bias.any() for one in load_lens(folder, small).all_translators())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"J": {}}, "outputs of blocks none of .*: expected blocks between 0 and 1"),
        ({"J": dict.fromkeys(range(3), torch.eye(8))}, "blocks 0 to 2 of .*: expected"),
        ({"J": {0: torch.eye(8), 1: torch.eye(9)}}, r"of shape \(8, 8\), got \(9, 9\)"),
        ({"J": {"embed": torch.eye(8)}}, "for 'embed', expected the number of a block"),
        ({"J": None}, "is not a Jacobian lens"),
        ({"metadata": {"target_layer": 1}}, "output of block 1, expected the last block .*, 2"),
        ({"target_layer": 1, "metadata": None}, "output of block 1, expected the last block"),
    ],
)
def test_jacobians_that_do_not_fit_are_refused(small, copy, change, message):
    with pytest.raises(InputError, match=message):
        load_lens(changed_pt(copy(JACOBIAN), **change), small)


def test_lens_of_another_model_is_refused(tokenizer):
    model = FrozenModel(make_gpt2(), tokenizer, name="other")
    with pytest.raises(InputError, match=r"of shape \(16, 16\), got \(8, 8\)"):
        load_lens(DATA / "tuned-lens-0.2.0", model)
    with pytest.raises(InputError, match=r"of shape \(16, 16\), got \(8, 8\)"):
        load_lens(DATA / JACOBIAN, model)


def test_jacobian_lens_is_no_tuned_lens(small):
    with pytest.raises(InputError, match="holds a jacobian lens, not a TunedLens"):
        TunedLens.load(DATA / JACOBIAN, small)


def test_what_a_format_cannot_hold_is_not_exported(small, tmp_path):
    lens = JacobianLens.from_model(small)
    with pytest.raises(InputError, match=r"ends in \.pt"):
        export_lens(lens, tmp_path)
    lens.translator(1).bias.data.fill_(1)
    with pytest.raises(InputError, match="layer 1 of the lens has a bias"):
        export_lens(lens, tmp_path / "lens.pt")
    ours = TunedLens.from_model(small)
    ours.save(tmp_path)
    with pytest.raises(InputError, match=r"another config\.json"):
        export_lens(ours, tmp_path)
    assert describe_lens(tmp_path)["format"] == 1


def test_evaluation_scores_lenses_of_other_libraries(small, tmp_path):
    folders = (f"{DATA}/tuned-lens-0.2.0", f"old={DATA}/tuned-lens-0.0.5", f"{DATA / JACOBIAN}")
    text = tmp_path / "text.txt"
    text.write_text("a small text " * 50)
    config = EvaluateConfig(lenses=folders, corpus=CorpusConfig(dataset=str(text)), tokens=60)
    evaluation = evaluate(config, model=small)
    assert list(evaluation.lenses) == ["logit", "tuned", "old", "jacobian"]
    assert evaluation.provenance["config"]["split"] == "all"


def test_doctor_examines_a_lens_of_another_library(small):
    checks = {check.name: check for check in doctor(small, DATA / "tuned-lens-0.2.0").checks}
    assert checks["the lens was made for this norm and unembedding"].passed is None
    assert checks["the lens is closer to the model than the logit lens"].passed is False


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has what lies in a folder; `asked` tells what was asked for."""

    def snapshot_download(repo_id, *, repo_type, revision, allow_patterns):
        hub.asked.append((repo_id, repo_type, revision, allow_patterns))
        return str(hub.folder)

    hub = SimpleNamespace(folder=tmp_path / "hub", asked=[])
    monkeypatch.setattr(checkpoint.hub, "snapshot_download", snapshot_download)
    return hub


def test_tuned_lens_on_the_hub_is_downloaded_without_its_neighbours(small, hub):
    shutil.copytree(DATA / "tuned-lens-0.2.0", hub.folder / "lens" / "me" / "tiny")
    lens = load_lens("space:AlignmentResearch/tuned-lens:lens/me/tiny", small)
    assert_logits(lens, small, load_file(DATA / "tuned-lens-0.2.0" / "logits.safetensors"))
    [(repo_id, repo_type, _, patterns)] = hub.asked
    assert (repo_id, repo_type) == ("AlignmentResearch/tuned-lens", "space")
    names = ("config.json", "lens.safetensors", "params.pt")
    assert set(patterns) == {f"lens/me/tiny/{name}" for name in names}
    expected = (
        "lens/you, holds no lens: expected config.json and lens.safetensors, "
        "or config.json and params.pt, and there is no config.json"
    )
    with pytest.raises(InputError, match=expected):
        load_lens("space:AlignmentResearch/tuned-lens:lens/you", small)


def test_jacobian_lens_on_the_hub_is_one_file(small, hub):
    (hub.folder / "tiny").mkdir(parents=True)
    shutil.copy(DATA / JACOBIAN, hub.folder / "tiny" / "lens.pt")
    assert type(load_lens("neuronpedia/jacobian-lens:tiny/lens.pt", small)) is JacobianLens
    assert hub.asked == [("neuronpedia/jacobian-lens", None, None, ["tiny/lens.pt"])]
    with pytest.raises(InputError, match=r"jacobian-lens on the hub has no other\.pt"):
        load_lens("neuronpedia/jacobian-lens:other.pt", small)


@pytest.mark.network
def test_lens_of_the_real_hub_is_nearer_than_the_logit_lens():
    model = load_model("gpt2", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lens("space:AlignmentResearch/tuned-lens:lens/gpt2", model)
