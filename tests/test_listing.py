"""`tunedlens list` shows every lens in a folder, and damaged ones too."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import make_evaluation, random_lens

from tunedlens import JacobianLens, TunedLens, checkpoint
from tunedlens.cli import list_command, train_command
from tunedlens.files import write_json

EMBEDDED = Path(__file__).parents[1] / "checkpoints" / "embedded"


def listed(capsys, *arguments):
    """The lines that the command prints, without the header."""
    assert list_command([str(argument) for argument in arguments]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == [
        *("folder", "model", "kind", "sites", "layers", "tokens", "KL,", "nats", "date")
    ]
    return lines


def change(folder, **entries):
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text()) | entries)


def test_every_kind_of_lens_is_a_row(tiny, tmp_path, capsys):
    held_out = make_evaluation().to_json()
    progress = {"init_tokens": 1000, "tokens": 2500}
    random_lens(tiny).save(tmp_path / "a", {"held_out": held_out, "progress": progress})
    JacobianLens.from_model(tiny, layers=[0, 2]).save(tmp_path / "b")
    for name in "ab":
        change(tmp_path / name, created="2026-11-22T00:56:27.652609+00:00")
    (tmp_path / "notes").mkdir()
    date = "2026-11-22 00:56"
    assert [re.split(" {2,}", line) for line in listed(capsys, tmp_path)] == [
        [f"{tmp_path}/a", "tiny", "tuned", "resid_pre", "all", "3,500", "4.500 ± 0.050", date],
        [f"{tmp_path}/b", "tiny", "jacobian", "resid_pre", "0,2", "–", "–", date],
    ]


def test_kl_of_a_lens_with_further_sites_is_that_of_the_stream(tiny, tmp_path, capsys):
    held_out = make_evaluation().to_json()
    further = [r | {"lens": f"{r['lens']} mlp_out", "value": 9.0} for r in held_out["results"]]
    held_out["results"] = sorted(held_out["results"] + further, key=lambda r: r["lens"])
    random_lens(tiny).save(tmp_path / "a", {"held_out": held_out})
    (line,) = listed(capsys, tmp_path)
    assert "4.500 ± 0.050" in line


def test_lens_of_version_0_1_0_has_the_mean_of_its_layers(capsys):
    (line,) = listed(capsys, EMBEDDED)
    assert line.split()[1:] == [
        *("embedded", "tuned", "resid_pre", "all", "1,863,680", "1.1712", "2026-11-22", "00:56"),
    ]


def test_trained_lens_is_in_the_default_folder(
    tmp_path, tiny_folder, text_file, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--seq-len", "16", "--init-tokens", "128", "--evaluate-tokens", "60"]
    asked = ["--model", str(tiny_folder), "--dataset", str(text_file), "--device", "cpu", *flags]
    assert train_command([*asked, "--fit", "closed-form", "--output", "checkpoints/run"]) == 0
    mean = capsys.readouterr().out.split("mean")[1].splitlines()[0].split()[-3:]
    (line,) = listed(capsys)
    folder, _, kind, _, _, tokens, *kl = line.split()[:9]
    assert (folder, kind, tokens, kl) == ("checkpoints/run", "closed-form", "128", mean)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), "is not the manifest"),
        (lambda folder: (folder / "config.json").unlink(), "holds no lens"),
        (lambda folder: (folder / "lens.safetensors").unlink(), "there is no file"),
        (lambda folder: (folder / "lens.safetensors").write_bytes(b"x" * 99), "cannot read"),
        (lambda folder: change(folder, model={}), "name is missing from model"),
        (lambda folder: change(folder, progress={}), "tokens is missing from progress"),
        (lambda folder: change(folder, progress=3), "damaged"),
        (lambda folder: change(folder, held_out={"results": []}), "damaged"),
        (lambda folder: change(folder, held_out="none"), "damaged"),
        (lambda folder: change(folder, config={"corpus": 3}), "damaged"),
        (lambda folder: change(folder, config=[]), "damaged"),
    ],
)
def test_damaged_lens_is_one_line_and_the_others_are_shown(
    tiny, tmp_path, capsys, damage, expected
):
    for name in ("good", "torn"):
        TunedLens.from_model(tiny).save(tmp_path / name)
    damage(tmp_path / "torn")
    good, torn = listed(capsys, tmp_path)
    assert "tuned" in good
    assert torn.startswith(f"{tmp_path}/torn  damaged: ")
    assert expected in torn


def test_interrupted_run_is_shown_with_how_to_continue(tmp_path, capsys):
    checkpoint.save_state(tmp_path / "run", checkpoint.State({}, {}))
    assert listed(capsys, tmp_path) == [
        f"{tmp_path}/run  interrupted; continue with: tunedlens train --resume {tmp_path}/run"
    ]


def test_folder_without_lenses_says_so(tmp_path, capsys):
    assert list_command([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"there is no lens in {tmp_path}\n"
    shutil.rmtree(tmp_path)
    assert list_command([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: there is no folder {tmp_path}\n"
