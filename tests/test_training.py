import dataclasses
import json
import os
import signal
import threading

import pytest
import safetensors.torch
import torch
from conftest import SHARED_DATA, in_two_processes, make_gpt2, short_run
from transformers import AutoTokenizer

from tunedlens import (
    CorpusConfig,
    FrozenModel,
    InputError,
    ModelConfig,
    TrainConfig,
    TunedLens,
    checkpoint,
    load_model,
)
from tunedlens.checkpoint import saved_config
from tunedlens.cli import train_command
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.distributed import join_processes
from tunedlens.engine.backend import Backend
from tunedlens.fit import LeastSquares, PreconditionedMuon
from tunedlens.training import Interrupted, loop, resolving, train


@pytest.fixture
def config(tiny_folder, text_file):
    return short_run(tiny_folder, text_file, tokens=640, init_tokens=128)


def lens_of(folder, config):
    return TunedLens.load(folder, load_model(config.model.model, device="cpu")).state_dict()


def assert_same_lens(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def interrupt_after(monkeypatch):
    """Ask a run to stop, as Ctrl-C would, in a given step; it stops after the next."""

    def arm(step):
        original, taken = PreconditionedMuon.step, []

        def take(self, *args):
            if len(taken) == step:
                os.kill(os.getpid(), signal.SIGINT)
            taken.append(step)
            original(self, *args)

        monkeypatch.setattr(PreconditionedMuon, "step", take)
        return lambda: monkeypatch.setattr(PreconditionedMuon, "step", original)

    return arm


def test_training_lowers_the_held_out_kl_of_every_layer(config, tmp_path):
    config = dataclasses.replace(config, tokens=6400, evaluate_tokens=150)
    evaluation = train(config, tmp_path / "run")
    logit, tuned = (evaluation.by_layer(lens, "kl_nats") for lens in ("logit", "tuned"))
    assert all(after.value < before.value for after, before in zip(tuned, logit, strict=True))


def test_closed_form_is_the_least_squares_lens(config, tmp_path):
    config = dataclasses.replace(config, fit="closed-form", tokens=None, ridge=1e-3)
    train(config, tmp_path / "run")
    lens, model = lens_of(tmp_path / "run", config), load_model(config.model.model, device="cpu")
    splits = load_splits(resolve_corpus(config.corpus, "", None), model.tokenizer)
    batches = splits.train.batches(4, 0)
    sums = LeastSquares(3, 16)
    for _ in range(2):  # 128 positions are two batches of 4 blocks of 16
        states = torch.stack(
            [s.flatten(0, 1) for s in model.residual_stream(next(batches).input_ids)]
        )
        sums.add(states[:-1], states[-1])
    for layer, columns in enumerate(sums.solve(1e-3).float()):
        (weight,) = (v for name, v in lens.items() if name.endswith(f".{layer}.weight"))
        assert torch.allclose(weight, columns[:, :-1], atol=2e-2 * float(columns.abs().max()))


@pytest.mark.parametrize("fit", ["closed-form", "preconditioned"])
def test_bias_only_fit_trains_and_saves_biases_only(config, tmp_path, fit):
    tokens = None if fit == "closed-form" else 6400
    config = dataclasses.replace(
        config, fit=fit, bias_only=True, tokens=tokens, evaluate_tokens=150
    )
    evaluation = train(config, tmp_path / "run")
    logit, ours = (evaluation.of_lens(lens, "kl_nats").value for lens in ("logit", "bias-only"))
    assert ours < logit
    with safetensors.safe_open(tmp_path / "run" / "lens.safetensors", "pt") as file:
        assert sorted(file.keys()) == [f"resid_pre.{layer}.bias" for layer in range(3)]
    lens = lens_of(tmp_path / "run", config)
    assert not any(value.any() for name, value in lens.items() if name.endswith("weight"))


def test_bias_only_closed_form_is_the_mean_difference(config, tmp_path):
    config = dataclasses.replace(config, fit="closed-form", tokens=None, bias_only=True)
    train(config, tmp_path / "run")
    model = load_model(config.model.model, device="cpu")
    splits = load_splits(resolve_corpus(config.corpus, "", None), model.tokenizer)
    batches = splits.train.batches(config.batch_size, config.seed)
    ids = torch.cat([next(batches).input_ids for _ in range(2)])  # init_tokens are 2 batches
    states = model.residual_stream(ids)
    lens = lens_of(tmp_path / "run", config)
    for layer in range(3):
        expected = (states[-1] - states[layer]).flatten(0, 1).mean(0)
        bias = lens[f"translators.resid_pre.{layer}.bias"]
        assert torch.allclose(bias, expected, atol=1e-5)


def test_fit_starts_from_another_lens_also_of_another_body(config, tiny_folder, tmp_path):
    train(dataclasses.replace(config, tokens=6400), tmp_path / "first")
    body = make_gpt2()
    with torch.no_grad():
        body.transformer.ln_f.weight.mul_(1.01)
    body.save_pretrained(tiny_folder)
    config = dataclasses.replace(config, tokens=64, lr=1e-9, init=str(tmp_path / "first"))
    train(config, tmp_path / "second")
    first = safetensors.torch.load_file(tmp_path / "first" / "lens.safetensors")
    second = safetensors.torch.load_file(tmp_path / "second" / "lens.safetensors")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    manifest = json.loads((tmp_path / "second" / "config.json").read_text())
    assert manifest["progress"]["init_lens"]["model"]["n_layers"] == 3


def test_lens_of_another_shape_is_no_start(config, tokenizer, tmp_path):
    TunedLens.from_model(FrozenModel(make_gpt2(n_layer=2), tokenizer)).save(tmp_path / "other")
    config = dataclasses.replace(config, init=str(tmp_path / "other"))
    with pytest.raises(InputError, match="does not hold 6 tensors for 3 layers of width 16"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        {"fit": "sgd", "bias_only": True},
        {"fit": "jacobian", "tokens": None, "bias_only": True},
        {"fit": "closed-form", "tokens": None, "init": "x"},
    ],
)
def test_fits_without_a_start_or_biases_alone_say_so(config, settings):
    with pytest.raises(InputError, match=r"--bias-only works with|does not use --init"):
        dataclasses.replace(config, **settings)


@pytest.mark.parametrize("fit", ["sgd", "muon"])
def test_published_baselines_train_a_lens_too(config, tmp_path, fit):
    evaluation = train(dataclasses.replace(config, fit=fit), tmp_path / "run")
    logit, tuned = (evaluation.by_layer(lens, "kl_nats") for lens in ("logit", "tuned"))
    assert sum(e.value for e in tuned) < sum(e.value for e in logit)
    manifest = checkpoint.read_manifest(tmp_path / "run")
    assert manifest["progress"]["init_tokens"] == 0
    assert manifest["config"]["fit"] == fit


def test_without_a_budget_a_run_ends_when_held_out_kl_has_converged(config, tmp_path):
    config = dataclasses.replace(config, tokens=None, max_tokens=10**9)
    evaluation = train(config, tmp_path / "run")
    history = checkpoint.read_manifest(tmp_path / "run")["progress"]["history"]
    end = history[-1]
    assert end["tokens"] < 10**6
    halfway = [result for result in history if 2 * result["tokens"] <= end["tokens"]]
    for then, now in zip(halfway[-1]["kl_nats"], end["kl_nats"], strict=True):
        assert now > 0.98 * then
    closed_form = train(
        dataclasses.replace(config, fit="closed-form", max_tokens=None), tmp_path / "closed"
    )
    for ours, start in zip(
        evaluation.by_layer("tuned", "kl_nats"),
        closed_form.by_layer("tuned", "kl_nats"),
        strict=True,
    ):
        assert ours.value <= start.value * 1.001


def test_a_sample_of_the_vocabulary_gives_nearly_the_lens_of_all_of_it(config, tmp_path):
    config = dataclasses.replace(config, tokens=6400, evaluate_tokens=150)
    exact = train(config, tmp_path / "exact")
    sampled = train(dataclasses.replace(config, vocab_sample=1000), tmp_path / "sampled")
    start = train(dataclasses.replace(config, fit="closed-form", tokens=None), tmp_path / "start")
    for one, other, closed in zip(
        *(found.by_layer("tuned", "kl_nats") for found in (exact, sampled, start)), strict=True
    ):
        assert abs(other.value - one.value) < 0.2 * (closed.value - one.value)


def _planned_precision(config):
    """The precision that a process plans; each would measure another backend by itself."""
    accelerator = join_processes("cpu")
    measured = Backend(("bf16", "fp32")[accelerator.process_index], "products")
    resolving.fastest_backend = lambda *_: measured
    model = load_model(config.model.model, device="cpu")
    return resolving.resolve(config, model, accelerator).precision


def test_all_processes_take_the_backend_that_the_first_one_measures(config):
    open_config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, device=None),
        precision=None,
        kernel=None,
    )
    assert in_two_processes(_planned_precision, open_config) == ["bf16", "bf16"]


def test_resumed_run_keeps_the_backend_that_was_measured(config, tmp_path, monkeypatch):
    open_config = dataclasses.replace(config, precision=None, kernel=None, init_tokens=None)
    monkeypatch.setattr(resolving, "fastest_backend", lambda *_: Backend("bf16", "products"))
    train(open_config, tmp_path / "run")
    monkeypatch.setattr(resolving, "fastest_backend", lambda *_: Backend("fp32", "attention"))
    train(dataclasses.replace(open_config, tokens=1280), tmp_path / "run", resume=True)
    saved = saved_config(tmp_path / "run")
    assert (saved.tokens, saved.precision, saved.kernel) == (1280, "bf16", "products")
    assert saved.init_tokens == 160


def test_command_that_resumes_on_another_device_chooses_the_micro_batch_anew(config, tmp_path):
    run = str(tmp_path / "run")
    train(dataclasses.replace(config, micro_batch_size=1), run)
    sizes = []
    for more in (
        ["--tokens", "1280"],
        ["--tokens", "1600", "--device", "cpu:0"],
        ["--tokens", "1920", "--device", "cpu", "--micro-batch-size", "2"],
    ):
        assert train_command(["--resume", run, *more]) == 0
        sizes.append(saved_config(tmp_path / "run").micro_batch_size)
    assert sizes == [1, 2048 // 16, 2]


def test_run_of_an_earlier_version_is_not_resumed(config, tmp_path):
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    manifest = json.loads(path.read_text())
    for name in ("kernel", "vocab_sample", "validation_tokens"):
        del manifest["config"][name]
    path.write_text(json.dumps(manifest | {"config": manifest["config"] | {"compile": False}}))
    with pytest.raises(InputError, match="earlier version"):
        train(dataclasses.replace(config, tokens=1280), tmp_path / "run", resume=True)


def test_attention_is_refused_where_there_is_none(config, tiny, monkeypatch):
    monkeypatch.setattr(FrozenModel, "device", torch.device("meta"))
    config = dataclasses.replace(config, kernel="attention", precision=None)
    with pytest.raises(InputError, match="--kernel attention works only on CPUs"):
        resolving.resolve(config, tiny, join_processes())


def test_attention_trains_the_lens_that_products_train(config, tmp_path):
    one = train(config, tmp_path / "products")
    other = train(dataclasses.replace(config, kernel="attention"), tmp_path / "attention")
    for a, b in zip(
        one.by_layer("tuned", "kl_nats"), other.by_layer("tuned", "kl_nats"), strict=True
    ):
        assert a.value == pytest.approx(b.value, rel=0.01)


def test_after_a_few_steps_the_run_says_how_long_it_takes(config, tmp_path, capsys):
    train(config, tmp_path / "run")
    assert "tokens per second: about 1 more minute\n" in capsys.readouterr().out


def test_the_table_is_announced_with_the_tokens_that_the_text_has(config, tmp_path, capsys):
    evaluation = train(dataclasses.replace(config, evaluate_tokens=10**6), tmp_path / "run")
    assert f"validation, {evaluation.tokens:,} for the table" in capsys.readouterr().out


def test_max_tokens_end_a_run_that_has_not_converged(config, tmp_path):
    config = dataclasses.replace(config, tokens=None, max_tokens=256)
    train(config, tmp_path / "run")
    assert checkpoint.read_manifest(tmp_path / "run")["progress"]["tokens"] == 256


def test_same_config_gives_the_same_lens(config, tmp_path):
    train(config, tmp_path / "one")
    train(config, tmp_path / "other")
    assert_same_lens(lens_of(tmp_path / "one", config), lens_of(tmp_path / "other", config))


@pytest.mark.parametrize("vocab_sample", [0, 400])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("step", [0, 5])
def test_interrupted_and_resumed_run_ends_bit_equal_to_an_unbroken_one(
    config, tmp_path, interrupt_after, step, streaming, vocab_sample
):
    config = dataclasses.replace(config, vocab_sample=vocab_sample)
    corpus = config.corpus
    if streaming:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"row {i}, {i * i}"}) for i in range(900)))
        corpus = dataclasses.replace(corpus, dataset=str(path), streaming=True)
    config = dataclasses.replace(config, corpus=corpus)
    train(config, tmp_path / "unbroken")
    disarm = interrupt_after(step)
    with pytest.raises(Interrupted, match=rf"after {128 + (step + 2) * 64} tokens"):
        train(config, tmp_path / "broken")
    disarm()
    assert not (tmp_path / "broken" / "config.json").exists()
    train(saved_config(tmp_path / "broken"), tmp_path / "broken", resume=True)
    assert not (tmp_path / "broken" / "state").exists()
    assert_same_lens(lens_of(tmp_path / "unbroken", config), lens_of(tmp_path / "broken", config))


def test_resumed_run_of_some_layers_and_low_rank_ends_bit_equal(config, tmp_path, interrupt_after):
    config = dataclasses.replace(config, layers="0,-1", low_rank=4)
    train(config, tmp_path / "unbroken")
    disarm = interrupt_after(4)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "broken")
    disarm()
    train(saved_config(tmp_path / "broken"), tmp_path / "broken", resume=True)
    lens = lens_of(tmp_path / "broken", config)
    assert "translators.resid_pre.2.left" in lens
    assert "translators.resid_pre.1.left" not in lens
    assert_same_lens(lens_of(tmp_path / "unbroken", config), lens)


def test_interrupt_in_the_last_step_finishes_the_run(config, tmp_path, interrupt_after):
    interrupt_after(9)
    assert train(config, tmp_path / "run").tokens == 60
    assert not (tmp_path / "run" / "state").exists()


def test_run_that_died_while_it_was_being_saved_is_finished_by_resume(
    config, tmp_path, monkeypatch
):
    train(config, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.lens_files, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert_same_lens(lens_of(tmp_path / "unbroken", config), lens_of(tmp_path / "run", config))


def test_state_of_another_version_is_refused(config, tmp_path, interrupt_after):
    interrupt_after(2)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    state = checkpoint.load_state(tmp_path / "run")
    state.metadata["progress"]["looks"] = state.metadata["progress"].pop("history")
    checkpoint.save_state(tmp_path / "run", state)
    with pytest.raises(InputError, match="saved by another version"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)


def test_resume_on_a_text_that_has_changed_is_refused(config, tmp_path, text_file, interrupt_after):
    interrupt_after(2)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    text_file.write_text(text_file.read_text() + "more")
    with pytest.raises(InputError, match="has changed since"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)


def test_baseline_that_blows_up_is_not_saved(config, tmp_path):
    with pytest.raises(InputError, match="give a smaller --lr than 1e"):
        train(dataclasses.replace(config, fit="sgd", lr=1e38), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_closed_form_takes_no_budget_of_steps():
    with pytest.raises(InputError, match="takes no steps; give --init-tokens, not --tokens"):
        TrainConfig(fit="closed-form", tokens=1000)


@pytest.mark.parametrize(
    "setting",
    [{"weight_decay": -1.0}, {"momentum": 1.0}, {"seed": -1}, {"lr": 0.0}, {"tokens": 0}],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match=f"--{next(iter(setting)).replace('_', '-')} must be"):
        TrainConfig(**setting)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs GPT-2's own tokenizer")
def test_training_on_any_gpt2_folder_with_the_real_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "gpt2-tokenizer")
    make_gpt2(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    text = (SHARED_DATA / "shakespeare.txt").read_text()[:30_000]
    (tmp_path / "play.txt").write_text(text)
    config = TrainConfig(
        model=ModelConfig(model=str(tmp_path / "gpt2"), device="cpu"),
        corpus=CorpusConfig(dataset=str(tmp_path / "play.txt")),
        tokens=4096,
        evaluate_tokens=310,
    )
    evaluation = train(config, tmp_path / "run")
    assert checkpoint.read_manifest(tmp_path / "run")["model"]["vocab_size"] == 50257
    logit, tuned = (evaluation.by_layer(lens, "kl_nats") for lens in ("logit", "tuned"))
    assert sum(e.value for e in tuned) < sum(e.value for e in logit)


@pytest.mark.parametrize("vocab_sample", [0, 400])
def test_micro_batches_change_memory_and_not_the_lens(config, tmp_path, vocab_sample):
    # In float32, and sampled in bfloat16: another cut of the step must not change the sample.
    precision = "bf16" if vocab_sample else "fp32"
    config = dataclasses.replace(
        config, fit="sgd", lr=0.01, vocab_sample=vocab_sample, precision=precision
    )
    train(config, tmp_path / "whole")
    train(dataclasses.replace(config, micro_batch_size=1), tmp_path / "parts")
    whole, parts = (lens_of(tmp_path / name, config) for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], atol=1e-3 if precision == "fp32" else 5e-3)


def test_states_that_wait_for_the_vocabulary_sample_lie_together(config, tmp_path, monkeypatch):
    # As tensors of their own they would leave gaps in memory, larger than the states themselves.
    original, storages = loop.accumulate_gradient, []

    def spy(lens, states, *args, **kwargs):
        storages.append({state.untyped_storage().data_ptr() for state in states[:-1]})
        return original(lens, states, *args, **kwargs)

    monkeypatch.setattr(loop, "accumulate_gradient", spy)
    train(dataclasses.replace(config, vocab_sample=400, micro_batch_size=1), tmp_path / "run")
    assert {len(found) for found in storages} == {1}


def test_finished_run_is_extended_with_more_tokens(config, tmp_path):
    train(config, tmp_path / "run")
    with pytest.raises(InputError, match="already been trained on 640 tokens"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    more = dataclasses.replace(saved_config(tmp_path / "run"), tokens=1280)
    train(more, tmp_path / "run", resume=True)
    assert checkpoint.read_manifest(tmp_path / "run")["progress"]["tokens"] == 1280


def test_resume_with_other_settings_is_refused(config, tmp_path):
    train(config, tmp_path / "run")
    other = dataclasses.replace(saved_config(tmp_path / "run"), tokens=1280, lr=0.5)
    with pytest.raises(InputError, match=r"other settings: lr was 0\.\d+ and is now 0\.5"):
        train(other, tmp_path / "run", resume=True)


def test_finished_run_is_never_overwritten(config, tmp_path):
    train(config, tmp_path / "run")
    before = lens_of(tmp_path / "run", config)
    with pytest.raises(InputError, match="holds a lens: choose another --output"):
        train(dataclasses.replace(config, seed=1), tmp_path / "run")
    assert_same_lens(before, lens_of(tmp_path / "run", config))


def test_interrupted_run_is_never_overwritten(config, tmp_path, interrupt_after):
    interrupt_after(2)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    with pytest.raises(InputError, match="holds an interrupted run"):
        train(config, tmp_path / "run")


def test_skipped_positions_have_no_part_in_the_lens(config, tmp_path, monkeypatch):
    seen = []
    original = LeastSquares.add

    def spy(self, hidden, final):
        seen.append(len(final))
        original(self, hidden, final)

    monkeypatch.setattr(LeastSquares, "add", spy)
    train(dataclasses.replace(config, skip_first=1, tokens=120), tmp_path / "run")
    assert seen[:2] == [4 * 15, 4 * 15]
    assert checkpoint.read_manifest(tmp_path / "run")["progress"]["tokens"] == 120


def test_skipping_a_whole_block_is_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"--skip-first must be less than --seq-len \(16\)"):
        train(dataclasses.replace(config, skip_first=16), tmp_path / "run")


def test_manifest_says_where_the_lens_comes_from(config, tmp_path):
    train(config, tmp_path / "run")
    manifest = checkpoint.read_manifest(tmp_path / "run")
    assert manifest["config"]["tokens"] == 640
    assert manifest["provenance"]["fingerprint"] == manifest["model"]["fingerprint"]
    assert len(manifest["corpus"]["train"]["tokens_sha256"]) == 64
    history = manifest["progress"]["history"]
    assert [result["tokens"] for result in history] == [0, 640]
    assert history[0]["kl_nats"] > history[1]["kl_nats"]
    assert (tmp_path / "run" / "learning_curve.svg").exists()
    assert "| mean |" in (tmp_path / "run" / "README.md").read_text()


def test_stream_that_runs_out_stops_the_run_with_a_reason(config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(300)))
    corpus = CorpusConfig(dataset=str(path), seq_len=16, streaming=True)
    config = dataclasses.replace(config, corpus=corpus, tokens=10**6)
    with pytest.raises(InputError, match="ran out"):
        train(config, tmp_path / "run")
    assert checkpoint.load_state(tmp_path / "run").metadata["progress"]["tokens"] > 0


def test_stream_that_runs_out_ends_a_run_without_a_budget(config, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(300)))
    corpus = CorpusConfig(dataset=str(path), seq_len=16, streaming=True)
    config = dataclasses.replace(config, corpus=corpus, tokens=None)
    train(config, tmp_path / "run")
    assert "ran out" in capsys.readouterr().out
    progress = checkpoint.read_manifest(tmp_path / "run")["progress"]
    assert progress["history"][-1]["tokens"] == progress["tokens"] > 0


def test_a_run_in_another_thread_leaves_signals_alone(config, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=train, args=(config, tmp_path / "run"))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "config.json").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_bfloat16_products_give_nearly_the_same_lens(config, tmp_path):
    config = dataclasses.replace(config, tokens=3200)
    exact = train(config, tmp_path / "fp32")
    rough = train(dataclasses.replace(config, precision="bf16"), tmp_path / "bf16")
    for one, other in zip(
        exact.by_layer("tuned", "kl_nats"), rough.by_layer("tuned", "kl_nats"), strict=True
    ):
        assert other.value == pytest.approx(one.value, rel=0.05)
