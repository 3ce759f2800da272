"""The card of a lens: what it says, what stays of an earlier one, and when it warns."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import make_evaluation, random_lens, write_text

from tunedlens import InputError, Quality, measure_quality, write_card
from tunedlens.cli import card_command
from tunedlens.fit import ValidationResult, last_doubling
from tunedlens.report import plots

FOREIGN = Path(__file__).parent / "data" / "foreign_lenses"


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch):
    """Rendering takes seconds."""
    monkeypatch.setattr(plots, "rendered", lambda *_: b"")


def scored(dataset, split, changed=None):
    """Results without a model; KL of tuned is half of logit's unless changed."""
    config = {"corpus": {"dataset": dataset}, "split": split}
    return dataclasses.replace(make_evaluation(changed), provenance={"config": config})


def history(*mean_kl):
    """Validations at 0, 100, 200, 400, ... tokens; every one of 8 layers has the same KL."""
    tokens = [0, *(100 * 2**i for i in range(len(mean_kl) - 1))]
    return [
        {"step": i, "tokens": t, "seconds": 1.0, "kl_nats": [kl] * 8, "standard_error": None}
        for i, (t, kl) in enumerate(zip(tokens, mean_kl, strict=True))
    ]


def quality(history=(), tokens=10**6, others=(), split="validation", **config):
    manifest = {
        "format": 1,
        "lens": "tuned",
        "model": {"name": "tiny", "d_model": 16},
        "config": {"fit": "preconditioned", "corpus": {"dataset": "own.txt"}} | config,
        "progress": {"init_tokens": 0, "tokens": tokens, "history": list(history)},
    }
    own = scored("own.txt", split)
    return Quality("tuned", "run", manifest, own, make_evaluation(), list(others))


def kinds(one):
    return [warning.kind for warning in one.warnings]


def test_last_doubling_compares_with_half_of_the_tokens():
    kl = {0: 9.0, 100: 8.0, 150: 6.0, 300: 3.0}
    doubling = last_doubling([ValidationResult(0, t, 0.0, [x, 2.0]) for t, x in kl.items()])
    assert (doubling.before.tokens, doubling.after.tokens) == (150, 300)
    assert doubling.gains == [0.5, 0.0]


@pytest.mark.parametrize(("last", "expected"), [(0.99, []), (0.97, ["undertrained"])])
def test_warns_where_the_last_doubling_still_gained(last, expected):
    assert kinds(quality(history(3, 2, 1, last))) == expected


def test_warning_counts_the_layers_and_names_the_worst():
    learned = history(3, 2, 1, 1)
    learned[-1]["kl_nats"] = [1, 1, 0.9, 1, 1, 1, 0.95, 1]
    (warning,) = quality(learned).warnings
    assert "(from 200 to 400)" in warning.message
    assert "2 of its 8 translators by more than 2 %, at most by 10 % at layer 2." in warning.message


def test_damaged_history_is_one_clear_error():
    learned = history(3, 2, 1, 1)
    for one in learned:
        one["kl_nats"] = one["kl_nats"][:5]
    with pytest.raises(InputError, match="has 5 translators, and the lens has 8"):
        _ = quality(learned).warnings
    learned[1]["kl_nats"] = [1.0]
    with pytest.raises(InputError, match="differ in length"):
        _ = quality(learned).warnings


def test_warns_of_fewer_tokens_than_the_width_asks_for():
    assert kinds(quality(tokens=128 * 16)) == []
    assert kinds(quality(tokens=128 * 16 - 1)) == ["undertrained"]
    assert kinds(quality(tokens=100, bias_only=True)) == []
    assert kinds(quality(tokens=100, fit="jacobian")) == []


@pytest.mark.parametrize(("factor", "expected"), [(1.4, []), (1.6, ["off corpus"])])
def test_warns_of_a_text_where_the_lens_gains_less_on_the_logit_lens(factor, expected):
    own = make_evaluation().by_layer("tuned", "kl_nats")
    # The logit lens is the same; a value at one layer alone does not matter.
    changed = {("tuned", layer, "kl_nats"): factor * own[layer].value for layer in range(8)}
    other = scored("other.txt", "all", changed | {("tuned", 0, "kl_nats"): 1e4})
    assert kinds(quality(others=[other])) == expected
    assert kinds(quality(others=[other], split="all")) == []  # its own corpus was not scored


@pytest.fixture
def saved(tiny, tiny_folder, text_file, tmp_path):
    """A lens as `train` saves it, without the time that training takes."""
    about = {"dataset": str(text_file), "bytes": 5, "tokens_sha256": "abc"}
    config = {
        "model": {"model": str(tiny_folder), "device": "cpu"},
        "corpus": {"dataset": str(text_file), "seq_len": 16, "bos": False},
        "fit": "closed-form",
        "precision": "fp32",
        "seed": 0,
    }
    folder = tmp_path / "run"
    random_lens(tiny).save(
        folder,
        {
            "config": config,
            "corpus": {"train": about},
            "progress": {"init_tokens": 100, "tokens": 0, "seconds": 1.0},
            "provenance": {"device": "cpu", "versions": {"tunedlens": "0.1.0"}},
        },
    )
    return folder


def table(card, heading):
    """The rows of a table by their first cell."""
    rows = card.partition(heading)[2].strip().split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {first: rest for first, *rest in cells}


def test_card_says_what_was_measured(saved, tiny, tmp_path):
    also = write_text(tmp_path / "also.txt")
    found = measure_quality(saved, also=[str(also)], tokens=45, model=tiny)
    assert found.is_held_out
    assert (found.own.tokens, found.transfer.tokens, found.others[0].tokens) == (45, 15, 45)
    card = write_card(found, saved).read_text()
    assert f"> **Warning.** {found.warnings[0].message}" in card
    kl = table(card, "KL by layer, in nats:")
    for layer in range(3):
        columns = iter(kl[str(layer)])
        for evaluation in (found.own, found.others[0]):
            for lens in ("logit", "closed-form"):
                estimate = evaluation.by_layer(lens, "kl_nats")[layer]
                value = float(next(columns).split()[0].replace(",", ""))
                assert value == pytest.approx(estimate.value, abs=estimate.standard_error / 10)
    further = table(card, "Bias, transfer and convergence by layer:")
    grid = found.transfer.transfer["closed-form"]["kl_nats"]
    assert further["0"][2] == "–"
    for layer in (1, 2):
        assert float(further[str(layer)][2].split()[0]) == pytest.approx(
            grid.values[layer - 1][layer], rel=1e-3
        )
    assert "no learning curve, because the lens was made in one pass" in card
    for name in ("overview", "transfer"):
        assert f"(card/{name}.png)" in card
        assert (saved / "card" / f"{name}.png").exists()


def test_command_keeps_front_matter_and_words_around_the_generated_part(saved, capsys):
    path = saved / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Mine\n\nBefore.\n")
    assert card_command([str(saved), "--tokens", "20"]) == 0
    path.write_text(path.read_text() + "\nAfter.\n")
    assert card_command([str(saved), "--tokens", "30"]) == 0
    assert "warning: The lens is undertrained" in capsys.readouterr().out
    _, front, card = path.read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["library_name"] == "tunedlens"
    assert card.startswith("\n# Mine\n\nBefore.\n")
    assert card.endswith("\nAfter.\n")
    assert card.count("## Quality") == 1
    assert "| 30 |" in card
    assert "| 20 |" not in card
    assert "`tunedlens card" in card


@pytest.mark.filterwarnings("ignore:.*farther from")
def test_card_of_a_lens_of_another_library_says_what_is_unknown(tmp_path, text_file):
    folder = shutil.copytree(FOREIGN / "tuned-lens-0.2.0", tmp_path / "theirs")
    asked = ["--model", str(FOREIGN / "model"), "--device", "cpu", "--dataset", str(text_file)]
    assert card_command([str(folder), *asked, "--tokens", "20"]) == 0
    card = (folder / "README.md").read_text()
    assert "in the format of another library" in card
    assert "- Training text and tokens: not known." in card
    assert "- *Convergence*: not known." in card
    assert "held out" not in card
    assert "Warning" not in card


def test_only_a_saved_lens_has_a_card(tmp_path):
    with pytest.raises(InputError, match="expected the path of a saved lens"):
        measure_quality("logit")
    with pytest.raises(InputError, match="holds no lens"):
        measure_quality(tmp_path)
