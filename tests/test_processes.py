"""Several processes give the lens of one, and what cannot share the work says so."""

import contextlib
import dataclasses
import io
import json

import pytest
from conftest import in_two_processes, make_gpt2, short_run, write_text
from transformers import AutoTokenizer

from tunedlens import InputError, builtin, report, train
from tunedlens.cli import evaluate_command, train_command
from tunedlens.distributed import join_processes
from tunedlens.training import checkpointing

FITS = {
    "preconditioned": {},
    "a sample of the vocabulary": {"vocab_sample": 400},
    "biases": {"bias_only": True},
    "sgd": {"fit": "sgd"},
    "closed form": {"fit": "closed-form", "tokens": None},
    "jacobian": {"fit": "jacobian", "tokens": None, "jacobian_targets": "same"},
    "no block for one": {"batch_size": 1, "micro_batch_size": None},
}
"""Runs whose lens must not depend on who computes it."""
DIVIDED = ["preconditioned", "a sample of the vocabulary", "biases", "closed form"]
"""Those whose layers can be divided among processes."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_gpt2().save_pretrained(folder / "tiny")
    AutoTokenizer.from_pretrained(builtin.FOLDER).save_pretrained(folder / "tiny")
    text = write_text(folder / "text.txt")
    common = {"tokens": 640, "init_tokens": 128, "batch_size": 5}
    return {
        name: short_run(folder / "tiny", text, **common | settings)
        for name, settings in FITS.items()
    }


def held_out(evaluation):
    """Every KL of a run's table."""
    return {(r.lens, r.layer): r.value for r in evaluation.results if r.metric == "kl_nats"}


def _train_and_evaluate(configs, flags, folder):
    """What a process sees: the tables of all runs, and what the two commands print."""
    found = {name: held_out(train(config, folder / name)) for name, config in configs.items()}
    for name in DIVIDED:
        config = dataclasses.replace(configs[name], shard_layers=True)
        found[f"{name}, divided"] = held_out(train(config, folder / f"{name}, divided"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_command([*flags, "--output", str(folder / "command")])
        evaluate_command(["--lens", str(folder / "command"), "--tokens", "150", "--device", "cpu"])
    return found, printed.getvalue()


@pytest.fixture(scope="module")
def shared(configs, tmp_path_factory):
    """The same by two processes: the folder, and what each of them found."""
    folder, plain = tmp_path_factory.mktemp("two"), configs["preconditioned"]
    flags = ["--model", plain.model.model, "--dataset", plain.corpus.dataset, "--device", "cpu"]
    flags += ["--seq-len", "16", "--tokens", "640", "--init-tokens", "128", "--batch-size", "5"]
    flags += ["--precision", "fp32", "--kernel", "products", "--evaluate-tokens", "60"]
    return folder, in_two_processes(_train_and_evaluate, configs, flags, folder)


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
    """The tables of one process."""
    folder = tmp_path_factory.mktemp("one")
    return {name: held_out(train(config, folder / name)) for name, config in configs.items()}


@pytest.mark.parametrize("name", FITS)
def test_two_processes_train_the_lens_of_one(name, alone, shared):
    for tables, _ in shared[1]:
        assert tables[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("name", DIVIDED)
def test_divided_layers_make_the_lens_of_one_process(name, alone, shared):
    for tables, _ in shared[1]:
        assert tables[f"{name}, divided"] == pytest.approx(alone[name], rel=1e-5)


def _train_and_keep_the_state(config, folder, shard_layers=None):
    checkpointing.checkpoint.remove_state = lambda _: None
    train(dataclasses.replace(config, shard_layers=shard_layers), folder)


def test_run_with_divided_layers_goes_on_in_one_process(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing.checkpoint, "remove_state", lambda _: None)
    config = configs["preconditioned"]
    train(config, tmp_path / "one")
    in_two_processes(_train_and_keep_the_state, config, tmp_path / "two", True)
    config = dataclasses.replace(config, tokens=1280)
    one, two = (held_out(train(config, tmp_path / name, resume=True)) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", FITS)
def test_micro_batches_change_memory_but_no_lens(name, alone, configs, tmp_path):
    config = dataclasses.replace(configs[name], micro_batch_size=1)
    assert held_out(train(config, tmp_path / "run")) == pytest.approx(alone[name], rel=1e-5)


def test_commands_share_their_work(shared, alone):
    folder, found = shared
    outputs = sorted(printed for _, printed in found)
    assert outputs[0] == ""  # one process prints for both
    assert outputs[1].count("saved to") == 1
    manifest = json.loads((folder / "command" / "config.json").read_text())
    by_commands = {
        (r["lens"], r["layer"]): r["value"]
        for r in manifest["held_out"]["results"]
        if r["metric"] == "kl_nats"
    }
    assert by_commands == pytest.approx(alone["preconditioned"], rel=1e-5)


def test_evaluation_by_two_processes_is_that_of_one(shared, tmp_path):
    folder = shared[0] / "command"
    by_two = report.read_evaluation(folder / "evaluation")
    assert by_two.provenance["processes"] == 2
    evaluate_command([
        "--lens", str(folder), "--tokens", "150", "--device", "cpu", "--output", str(tmp_path)
    ])  # fmt: skip
    by_one = report.read_evaluation(tmp_path)
    for a, b in zip(by_two.results, by_one.results, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-8, abs=1e-8)


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    join_processes("cpu")  # accelerate is set up for one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="does not connect them"):
        join_processes("cpu")


def test_accelerate_launch_that_starts_one_process_on_cpus_is_refused(monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` sets."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(InputError, match="use: torchrun"):
        join_processes()
