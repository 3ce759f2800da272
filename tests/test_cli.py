import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import safetensors.torch
from conftest import make_gpt2, write_text
from transformers import AutoTokenizer

from tunedlens import (
    CorpusConfig,
    EvaluateConfig,
    TunedLens,
    builtin,
    checkpoint,
    evaluate,
    load_model,
)
from tunedlens.cli import doctor_command, evaluate_command, main, train_command
from tunedlens.report import plots

ROOT = Path(__file__).parents[1]
FAST = ["--seq-len", "16", "--tokens", "640", "--batch-size", "4", "--device", "cpu"]
FAST += ["--evaluate-tokens", "60", "--init-tokens", "128", "--precision", "fp32"]
FAST += ["--kernel", "products"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(tiny_folder, text_file):
    """Flags for a model and a text."""
    return ["--model", str(tiny_folder), "--dataset", str(text_file), *FAST]


def fails(command, arguments, capsys, *expected):
    """One clear line on standard error, a status other than 0, no traceback."""
    status = command([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for words in expected:
        assert words in lines[0]


@pytest.mark.renders
def test_both_commands_run_again_and_again(here, asked, capsys):
    for _ in range(2):
        assert train_command(asked) == 0
        assert evaluate_command(["--tokens", "100"]) == 0
    runs = sorted((here / "checkpoints").iterdir())
    assert len(runs) == 2
    newest = checkpoint.newest_lens(here / "checkpoints")
    assert newest == Path("checkpoints") / runs[1].name or newest == runs[1]
    out = capsys.readouterr().out
    assert "tuned KL, nats" in out
    scored = f"checkpoints/{newest.name}"
    assert f"\nscoring {scored} and the logit lens; output: {scored}/evaluation\n" in out
    assert "perplexity" in out
    names = {file.name for file in (runs[1] / "evaluation").iterdir()}
    figures = set(plots.DRAWINGS) - {"transfer", "by_position"}
    assert names == {f"{name}.{kind}" for name in figures for kind in plots.FORMATS} | {
        *("metrics.json", "metrics.csv", "differences.csv", "report.md", "report.html"),
    }


def test_csv_and_json_hold_the_same_values(here, asked):
    train_command([*asked, "--output", "run"])
    evaluate_command(["--lens", "run", "--output", "out", "--tokens", "100"])
    results = json.loads((here / "out" / "metrics.json").read_text())["results"]
    with (here / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [result["value"] for result in results]
    assert {row["lens"] for row in rows} == {"logit", "tuned", "model"}


def test_config_file_sets_flags_and_the_command_line_wins(here, asked):
    (here / "run.yaml").write_text("tokens: 128\nseed: 7\nlr: 1e-3\nstreaming: false\n")
    asked = [a for a in asked if a not in ("--tokens", "640")]
    assert train_command([*asked, "--config", "run.yaml", "--seed", "9", "--output", "run"]) == 0
    config = checkpoint.read_manifest(here / "run")["config"]
    assert (config["tokens"], config["seed"], config["lr"]) == (128, 9, 1e-3)


def test_evaluation_scores_the_text_that_was_held_out(here, asked):
    train_command([*asked, "--output", "run"])
    evaluate_command(["--lens", "run"])
    about = json.loads((here / "run" / "evaluation" / "metrics.json").read_text())["provenance"]
    manifest = checkpoint.read_manifest(here / "run")
    assert about["corpus"] == manifest["corpus"]["validation"]
    assert about["fingerprint"] == manifest["model"]["fingerprint"]


@pytest.mark.usefixtures("here")
def test_evaluation_refuses_to_score_what_was_trained_on(asked, text_file, capsys):
    train_command([*asked, "--output", "run"])
    capsys.readouterr()
    fails(evaluate_command, ["--lens", "run", "--seq-len", "8"], capsys, "--seq-len must be 16")
    same = ["--lens", "run", "--dataset", text_file]
    fails(evaluate_command, [*same, "--text-column", "x"], capsys, "--text-column must be None")
    manifest = json.loads(Path("run/config.json").read_text())
    manifest["config"]["corpus"]["streaming"] = True
    Path("streamed").mkdir()
    Path("streamed/config.json").write_text(json.dumps(manifest))
    explicit = ["--lens", "streamed", "--no-streaming"]
    fails(evaluate_command, explicit, capsys, "--streaming must be True")
    text_file.write_bytes(text_file.read_bytes() + b"more")
    fails(evaluate_command, ["--lens", "run"], capsys, "has changed since")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tokenizer):
    """A model, a text and three lenses for them, made once."""
    folder = tmp_path_factory.mktemp("trained")
    make_gpt2().save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    write_text(folder / "text.txt")
    flags = ["--model", str(folder / "tiny"), "--dataset", str(folder / "text.txt"), *FAST]
    one_pass = [flag for flag in flags if flag not in ("--tokens", "640")]
    assert train_command([*flags, "--output", str(folder / "steps")]) == 0
    for fit in ("closed-form", "jacobian"):
        assert train_command([*one_pass, "--fit", fit, "--output", str(folder / fit)]) == 0
    return folder


@pytest.fixture
def lenses(here, trained):
    """The three lenses, in the folder where the test runs."""
    for name in ("steps", "closed-form", "jacobian"):
        shutil.copytree(trained / name, here / name)
    return trained


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.usefixtures("lenses")
def test_lenses_of_every_kind_are_evaluated_side_by_side(here, capsys):
    names = ["unigram", "mean", "steps", "closed-form", "jacobian"]
    flags = [flag for name in names for flag in ("--lens", name)]
    more = ["--metrics", "all", "--by-position", "--transfer", "--tokens", "100"]
    assert evaluate_command([*flags, *more, "--output", "out"]) == 0
    evaluation = read(here / "out")
    lenses = list(dict.fromkeys(result["lens"] for result in evaluation["results"]))
    assert lenses == ["logit", "unigram", "mean", "tuned", "closed-form", "jacobian", "model"]
    assert set(evaluation["transfer"]) == {"tuned", "closed-form", "jacobian"}
    assert evaluation["tokens"] == 100
    assert len(evaluation["tokens_sha256"]) == 64
    assert evaluation["provenance"]["lenses"]["tuned"]["folder"] == "steps"
    assert "Mean prediction depth (of 3 layers)" in capsys.readouterr().out


def test_text_of_any_lens_is_scored_where_it_was_held_out(here, lenses):
    text_file, other = lenses / "text.txt", here / "other.txt"
    other.write_text("another text, all of it\n" * 200)
    flags = ["--model", str(lenses / "tiny"), "--dataset", str(other), *FAST]
    assert train_command([*flags, "--output", "second"]) == 0
    spelled = os.path.relpath(text_file)
    both = ["--lens", "second", "--lens", "steps", "--dataset", spelled, "--tokens", "50"]
    assert evaluate_command([*both, "--output", "out"]) == 0
    about = read(here / "out")["provenance"]
    assert about["config"]["split"] == "validation"
    held_out = checkpoint.read_manifest(here / "steps")["corpus"]["validation"]
    assert about["corpus"]["tokens_sha256"] == held_out["tokens_sha256"]


def test_baseline_is_made_from_the_training_text_whatever_is_scored(here, lenses):
    (here / "other.txt").write_text("another text, all of it\n" * 40)
    flags = ["--lens", "steps", "--lens", "unigram", "--dataset", "other.txt"]
    assert evaluate_command([*flags, "--output", "out"]) == 0
    about = read(here / "out")["provenance"]["lenses"]["unigram"]
    assert about["text"]["dataset"] == str(lenses / "text.txt")


@pytest.mark.usefixtures("lenses")
def test_report_names_a_command_that_gives_the_same_values(here):
    (here / "checkpoints").mkdir()
    (here / "steps").rename(here / "checkpoints" / "a run")
    assert evaluate_command(["--tokens", "50", "--output", "out"]) == 0
    first = read(here / "out")
    command = shlex.split(first["provenance"]["command"])
    assert command[:2] == ["tunedlens", "evaluate"]
    assert evaluate_command(command[2:]) == 0
    assert read(here / "out")["results"] == first["results"]


@pytest.mark.usefixtures("lenses")
@pytest.mark.parametrize("dataset", [None, "other.txt"])
def test_evaluate_from_python_does_what_the_command_does(here, dataset):
    (here / "other.txt").write_text("another text, all of it\n" * 200)
    flags = ["--dataset", dataset] if dataset else []
    flags += ["--lens", "steps", "--lens", "unigram", "--tokens", "50", "--output", "out"]
    assert evaluate_command(flags) == 0
    config = EvaluateConfig(
        lenses=("steps", "unigram"), corpus=CorpusConfig(dataset=dataset), tokens=50
    )
    evaluation, command = evaluate(config).to_json(), read(here / "out")
    for changing in ("created", "command"):
        del evaluation["provenance"][changing], command["provenance"][changing]
    assert json.loads(json.dumps(evaluation)) == command


@pytest.mark.usefixtures("lenses")
def test_lens_is_evaluated_in_the_dtype_asked_for(here):
    manifest = json.loads((here / "steps" / "config.json").read_text())
    manifest["config"]["model"]["dtype"] = "bfloat16"
    (here / "steps" / "config.json").write_text(json.dumps(manifest))
    for flags, dtype in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        assert (
            evaluate_command(["--lens", "steps", "--tokens", "50", "--output", "out", *flags]) == 0
        )
        assert read(here / "out")["provenance"]["dtype"] == dtype


@pytest.mark.usefixtures("lenses")
def test_lenses_of_one_kind_are_named_apart(here):
    flags = ["--tokens", "50", "--output", "out"]
    (here / "steps").rename(here / "a")
    shutil.copytree(here / "a", here / "b")
    assert evaluate_command(["--lens", "a", "--lens", "b", "--lens", "mine=a", *flags]) == 0
    found = {result["lens"] for result in read(here / "out")["results"]}
    assert found == {"logit", "a", "b", "mine", "model"}


@pytest.mark.usefixtures("lenses")
def test_prompts_are_on_one_page_with_a_folder_of_files_each(here, capsys):
    (here / "prompts.txt").write_text("def f\\n\nx = 1\n")
    flags = ["--lens", "steps", "--prompt", "a <b>", "--prompt-file", "prompts.txt", "--top-k", "3"]
    for _ in range(2):
        assert evaluate_command([*flags, "--output", "out"]) == 0
    folders = sorted(path.name for path in (here / "out").iterdir() if path.is_dir())
    assert [re.sub("-[0-9a-f]{6}$", "", name) for name in folders] == ["a-b", "def-f", "x-1"]
    figures = {"heatmap.svg", "kl.svg", "curves.svg"}
    tables = {"table.csv", "words-logit.csv", "words-tuned.csv"}
    for name in folders:
        found = {path.name for path in (here / "out" / name).iterdir()}
        assert found == figures | tables | {"page.html"}
    said = capsys.readouterr().out
    assert "'def f\\n'\nbest tokens after ↵" in said
    address = said.rstrip().splitlines()[-1]
    assert address == (here / "out" / "report.html").resolve().as_uri()
    page = (here / "out" / "report.html").read_text()
    assert page.count("<iframe") == 3
    assert '<pre class="text">a &lt;b&gt;</pre>' in page
    for words in ("steps", "tunedlens evaluate --lens steps", "The same tokens, coloured by"):
        assert words in page
    for path in re.findall(r'href="([^#"]+)"', page)[1:]:
        assert (here / "out" / path).exists()
    assert "<th><button>3</button></th></tr>" in page  # the number of best tokens
    with (here / "out" / folders[2] / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["lens"] for row in rows} == {"logit", "tuned"}


@pytest.mark.usefixtures("lenses")
def test_file_is_one_prompt_if_it_is_read_whole(here, capsys):
    (here / "code.py").write_text("def f():\n    return 1\n")
    flags = ["--lens", "logit", "--prompt-file", "code.py", "--whole-file", "--output", "out"]
    assert evaluate_command([*flags, "--sites", "resid_mid,resid_post"]) == 0
    said = capsys.readouterr().out
    assert "'def f():\\n    return 1'" in said
    assert " 0 resid_mid  " in said
    assert len(list((here / "out").iterdir())) == 2


@pytest.mark.usefixtures("lenses")
def test_another_prompt_leaves_the_first_ones_report_and_other_files(here):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    for prompt in ("x = 1", "日本"):
        assert evaluate_command(["--lens", "steps", "--prompt", prompt, "--output", "out"]) == 0
    assert len(list((here / "out").glob("*/page.html"))) == 2
    assert (here / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("lenses")
def test_prompt_for_another_model_than_the_newest_lens_is_made_for(here, capsys):
    shutil.copytree("steps", "checkpoints/steps")
    make_gpt2(n_layer=2).save_pretrained("other")
    AutoTokenizer.from_pretrained(builtin.FOLDER).save_pretrained("other")
    assert evaluate_command(["--prompt", "x = 1", "--model", "other"]) == 0
    assert "only the logit lens is shown: the newest lens was made for" in capsys.readouterr().out
    assert not list((here / "prompts").glob("*/*tuned*"))


def test_long_prompt_is_drawn_in_part_and_read_in_windows(here, tiny_folder):
    prompt = "a b c " * 50
    flags = ["--prompt", prompt, "--model", str(tiny_folder), "--stride", "16"]
    assert evaluate_command(flags) == 0
    page = (here / "prompts" / "report.html").read_text()
    assert "Only the last 44 of 151 positions are drawn here." in page
    (table,) = (here / "prompts").glob("*/table.csv")
    rows = table.read_text().splitlines()
    assert len(rows) > 4 * 150


@pytest.mark.usefixtures("lenses")
def test_evaluation_of_fewer_tokens_leaves_the_one_of_more(here):
    for tokens in ("60", "30"):
        assert evaluate_command(["--lens", "steps", "--tokens", tokens]) == 0
    for name, tokens in (("", 60), ("-30-tokens", 30)):
        assert read(here / "steps" / f"evaluation{name}")["tokens"] == tokens


@pytest.mark.renders
def test_prompt_without_any_lens_gives_the_logit_lens(here, tiny_folder):
    assert evaluate_command(["--prompt", "x = 1", "--model", str(tiny_folder)]) == 0
    assert list((here / "prompts").glob("x-1-*/curves.svg"))
    assert not list((here / "prompts").glob("*/*tuned*"))


@pytest.mark.usefixtures("lenses")
def test_bad_prompts_are_one_line_and_leave_nothing(here, capsys):
    (here / "empty.txt").write_text("\n")
    (here / "evaluated").mkdir()
    (here / "evaluated" / "metrics.json").write_text("{}")
    capsys.readouterr()
    for flags, *expected in [
        (["--prompt", ""], "has no tokens"),
        (["--prompt", "fine", "--prompt", "a b c " * 40], "reads at most 32"),
        (["--prompt", "x", "--tokens", "5"], "--tokens does not work with --prompt"),
        (["--prompt-file", "nowhere.txt"], "there is no --prompt-file nowhere.txt"),
        (["--prompt-file", "empty.txt"], "has no prompt"),
        (["--prompt", "x", "--by-position"], "--by-position does not work with --prompt"),
        (["--prompt", "x", "--lens", "unigram"], "predict the same for every prompt"),
        (["--prompt", "x", "--sites", "resid_mid"], "no translators for resid_mid", "--sites"),
        (["--prompt", "x", "--top-k", "0"], "k must be between 1 and"),
        (["--prompt", "x", "--whole-file"], "--prompt-file"),
        (["--top-k", "3"], "--top-k works only with --prompt or --prompt-file"),
        (["--prompt", "x", "--output", "evaluated"], "evaluated holds an evaluation"),
    ]:
        fails(evaluate_command, ["--lens", "steps", *flags], capsys, *expected)
    assert not (here / "steps" / "prompts").exists()


@pytest.mark.usefixtures("lenses")
def test_redraw_makes_the_same_report_without_a_model(here, monkeypatch):
    evaluate_command(["--lens", "steps", "--tokens", "50", "--output", "out"])
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    monkeypatch.setattr("tunedlens.model.load_model", None)
    for path in (here / "out").iterdir():
        if path.name != "metrics.json":
            path.unlink()
    assert evaluate_command(["--redraw", "out"]) == 0
    assert {path.name: path.read_bytes() for path in (here / "out").iterdir()} == before


@pytest.mark.usefixtures("lenses")
def test_bad_lenses_are_one_line(here, tokenizer, text_file, capsys):
    make_gpt2(seed=1).save_pretrained(here / "other")
    tokenizer.save_pretrained(here / "other")
    lens = TunedLens.from_model(load_model(here / "other", device="cpu"))
    lens.save(here / "foreign")
    lens.save(here / "broken")
    tensors = safetensors.torch.load_file(here / "broken" / "lens.safetensors")
    tensors["resid_pre.1.bias"][0] = math.nan
    content = safetensors.torch.save(tensors)
    (here / "broken" / "lens.safetensors").write_bytes(content)
    manifest = json.loads((here / "broken" / "config.json").read_text())
    manifest["lens_sha256"] = hashlib.sha256(content).hexdigest()
    (here / "broken" / "config.json").write_text(json.dumps(manifest))
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("mine")
    capsys.readouterr()
    cases = [
        (["--lens", "steps", "--lens", "foreign"], "does not fit"),
        (["--lens", "broken", "--model", "other", "--dataset", text_file], "not finite", "1.bias"),
        (
            ["--lens", "steps", "--lens", "steps"],
            "the lens name steps is already used",
            "NAME=steps",
        ),
        (["--lens", "mean", "--lens", "mean"], "the lens name mean is already used", "NAME=mean"),
        (["--lens", "model=steps"], "model"),
        (["--lens", "nowhere"], "nowhere holds no lens"),
        (
            ["--lens", "steps", "--output", "mine"],
            "mine holds files that do not belong",
        ),
        (["--lens", "steps", "--tokens", "1e6"], "asks for 1,000,000 positions", "has 285"),
        (["--lens", "steps", "--metrics", "some"], "invalid choice", "some"),
        (["--redraw", "nowhere"], "nowhere holds no evaluation"),
        (["--redraw", "mine", "--tokens", "5"], "--redraw does not work with --tokens"),
        (["--redraw", "mine", "--output", "x"], "--redraw does not work with --output"),
    ]
    for flags, *expected in cases:
        fails(evaluate_command, flags, capsys, *expected)
    assert [path.name for path in (here / "mine").iterdir()] == ["thesis.txt"]


def test_another_text_is_scored_whole_and_beside_the_lens_own_results(here, asked):
    train_command([*asked, "--output", "run"])
    (here / "other.txt").write_text("another text, all of it\n" * 40)
    assert evaluate_command(["--lens", "run", "--dataset", "other.txt"]) == 0
    evaluation = json.loads((here / "run" / "evaluation-other" / "metrics.json").read_text())
    blocks = sum(side["blocks"] for side in evaluation["provenance"]["corpus"].values())
    assert evaluation["tokens"] == blocks * 15
    assert evaluation["provenance"]["config"]["split"] == "all"


def test_bad_input_to_train_is_one_line(here, asked, capsys):
    (here / "empty.txt").touch()
    (here / "short.txt").write_text("a few words")
    (here / "file").touch()
    (here / "bad.yaml").write_text("- a list")
    cases = [
        (["--dataset", "missing.txt"], "missing.txt", "no such file"),
        (["--dataset", "empty.txt"], "is empty"),
        (["--dataset", "short.txt"], "less than one block of 16"),
        (["--model", here], "is not a model"),
        (["--model", here / "nowhere"], "expected a folder with a model"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--output", "file/run"], "cannot write to file/run"),
        (["--seq-len", "64"], "--seq-len must be at most 32"),
        (["--device", "cuda:9"], "cannot use the device cuda:9"),
        (["--device", "nonsense"], "cannot use the device nonsense"),
        (["--config", "absent.yaml"], "there is no --config absent.yaml"),
        (["--config", "bad.yaml"], "expected lines like"),
        (["--sites", "resid_midd"], "--sites must be some of", "got resid_midd"),
        (["--resume"], "no interrupted run under checkpoints"),
        (["--resume", "nowhere"], "nowhere holds no lens"),
    ]
    before = set(here.rglob("*"))
    for flags, *expected in cases:
        fails(train_command, [*asked, *flags], capsys, *expected)
    assert set(here.rglob("*")) == before


def test_bad_input_to_evaluate_is_one_line(here, asked, capsys):
    fails(evaluate_command, [], capsys, "no lens under checkpoints")
    train_command([*asked, "--output", "run"])
    capsys.readouterr()
    for flags, *expected in [
        (["--lens", "nowhere"], "nowhere holds no lens"),
        (["--lens", "unigrm"], "unigrm holds no lens"),
        (["--lens", "run", "--model", here / "runn"], "expected a folder with a model"),
        (["--lens", "run", "--beside", here / "runn"], "expected a folder with a model"),
        (["--lens", "run", "--beside", "embedded"], "embedded has a different shape than"),
        (["--lens", "run", "--tokens", "0"], "--tokens must be at least 1"),
        (["--lens", "run", "--dataset", "missing.txt"], "no such file"),
        (["--lens", "run", "--output", "run/config.json/x"], "cannot write to"),
        (["--lens", ROOT / "checkpoints" / "embedded", "--model", asked[1]], "does not fit"),
    ]:
        fails(evaluate_command, flags, capsys, *expected)
    weights = here / "run" / "lens.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    fails(evaluate_command, ["--lens", "run"], capsys, "damaged")


@pytest.mark.usefixtures("here")
def test_hub_names_without_a_network_are_one_line(asked, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    fails(
        train_command, [*asked, "--model", "gpt2-none"], capsys, "cannot load the model gpt2-none"
    )
    fails(
        train_command, [*asked, "--dataset", "nobody/nothing"], capsys, "nobody/nothing", "network"
    )
    fails(
        evaluate_command,
        ["--lens", "nobody/nothing"],
        capsys,
        "there is no folder nobody/nothing, and the hub cannot be read",
    )


def test_wrong_flags_are_refused_by_the_parser(capsys):
    fails(train_command, ["--tokens", "many"], capsys, "--tokens: expected a whole number")
    fails(train_command, ["--dtype", "int8"], capsys, "--dtype: invalid choice: 'int8'")
    fails(evaluate_command, ["--colour"], capsys, "unrecognized arguments: --colour")
    fails(doctor_command, ["--modle", "gpt2"], capsys, "--modle gpt2; did you mean --model?")
    fails(train_command, ["--tokns=5"], capsys, "--tokns=5; did you mean --tokens?")


def test_wrong_command_names_the_nearest_one(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tunedlens", "evalute"])
    assert main() == 2
    assert "no command evalute; did you mean evaluate?" in capsys.readouterr().err


def test_help_says_what_each_command_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tunedlens", "--help"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[0] for line in lines if re.match("  [a-z]+ {2,}[a-z]", line)]
    assert commands == ["train", "evaluate", "list", "plan", "doctor", "card"]
    for name in commands:
        monkeypatch.setattr(sys, "argv", ["tunedlens", name, "--help"])
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().out.startswith(f"usage: tunedlens {name} ")


def test_version_is_that_of_the_package(capsys, monkeypatch):
    expected = f"tunedlens {version('residual-lens')}\n"
    monkeypatch.setattr(sys, "argv", ["tunedlens", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit):
        evaluate_command(["--version"])
    assert capsys.readouterr().out == expected


def test_missing_lens_names_those_that_are_there(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        shutil.copy(ROOT / "checkpoints/embedded/config.json", tmp_path / "checkpoints" / name)
    monkeypatch.chdir(tmp_path)
    those = "saved lenses: checkpoints/one, checkpoints/two"
    fails(evaluate_command, ["--lens", "onne"], capsys, "onne holds no lens", those)


@pytest.mark.parametrize(
    ("command", "own"), [("train", "--seed --fit --resume"), ("evaluate", "--lens")]
)
def test_script_is_the_installed_command_and_its_help_names_the_flags(
    command, own, capsys, monkeypatch
):
    (installed,) = entry_points(group="console_scripts", name="tunedlens")
    monkeypatch.setattr(sys, "argv", ["tunedlens", command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        installed.load()()
    text = capsys.readouterr().out
    for flag in f"--model --dataset --output --tokens --config --wandb {own}".split():
        assert flag in text
    script = [sys.executable, ROOT / f"{command}.py", "--help"]
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout == text


@pytest.mark.usefixtures("lenses")
def test_evaluation_goes_to_wandb_with_its_table_and_pictures(here):
    flags = ["--lens", "steps", "--tokens", "50", "--output", "out", "--wandb", "offline"]
    assert evaluate_command(flags) == 0
    (media,) = (here / "out").glob("wandb/offline-run-*/files/media")
    (table,) = media.rglob("metrics*.table.json")
    assert len(json.loads(table.read_text())["data"]) == len(read(here / "out")["results"])
    assert len(list(media.rglob("*.png"))) == len(plots.DRAWINGS) - 2
    assert evaluate_command(flags) == 0  # what wandb left is ours as well


def run_with_wandb(asked, output, capsys):
    started = time.monotonic()
    assert train_command([*asked, "--wandb", "--output", output]) == 0
    assert time.monotonic() - started < 60
    assert list(Path(output).glob("wandb/offline-run-*"))
    return capsys.readouterr().out


def test_wandb_without_a_key_goes_offline_with_one_line(here, asked, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("NETRC", str(here / "netrc"))
    assert "kept offline" in run_with_wandb(asked, "run", capsys)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("answer", ["refused", "silence"])
def test_wandb_that_does_not_answer_goes_offline_with_one_line(asked, capsys, monkeypatch, answer):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answer == "silence":
            server.listen(50)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert "kept offline" in run_with_wandb(asked, "run", capsys)
