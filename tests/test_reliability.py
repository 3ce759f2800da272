"""What a run survives: bad numbers, damaged states, other runs, signals, a full disk."""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import in_two_processes, make_gpt2, short_run, write_text

from tunedlens import InputError, TrainConfig, checkpoint, files, report
from tunedlens.checkpoint import saved_config
from tunedlens.cli import train_command
from tunedlens.corpus import PackedCorpus
from tunedlens.engine import accumulate_gradient
from tunedlens.fit import LeastSquares, PreconditionedMuon
from tunedlens.model import FrozenModel
from tunedlens.training import Interrupted, bad_blocks, checkpointing, loop, resolving, train
from tunedlens.training.lock import LOCK, _acquire, locked
from tunedlens.training.state_cache import CacheSettings


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tokenizer):
    """A run that nothing happens to, with its config and the blocks of every step."""
    folder = tmp_path_factory.mktemp("clean")
    make_gpt2().save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    text = write_text(folder / "text.txt")
    config = short_run(folder / "tiny", text, tokens=512, init_tokens=128, seed=1)
    blocks, original = [], loop._accumulate

    def accumulate(run, state, input_ids, active):
        blocks.append(input_ids.tolist())
        return original(run, state, input_ids, active)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_accumulate", accumulate)
        train(config, folder / "run")
    return SimpleNamespace(config=config, folder=folder / "run", blocks=blocks)


@pytest.fixture
def config(clean):
    return clean.config


def weights(folder):
    return (folder / "lens.safetensors").read_bytes()


def progress(folder):
    return json.loads((folder / "config.json").read_text())["progress"]


def at_step(monkeypatch, number, act):
    """Call a function at the start of a step of the optimizer, counted from 1."""
    original, taken = PreconditionedMuon.step, []

    def step(self, *args):
        taken.append(1)
        if len(taken) == number:
            act()
        original(self, *args)

    monkeypatch.setattr(PreconditionedMuon, "step", step)


# Bad numbers


@pytest.fixture
def poison(monkeypatch):
    """Make a state NaN, from a layer on, in every block that `is_chosen` picks by its ids."""

    def arm(is_chosen, layer=1):
        original = FrozenModel.states_at

        def states_at(self, points, input_ids, attention_mask=None):
            states = original(self, points, input_ids, attention_mask)
            for row, ids in enumerate(input_ids):
                if is_chosen(tuple(ids.tolist())):
                    for point, state in zip(points, states, strict=True):
                        if point.layer >= layer:
                            state[row] = torch.nan
            return states

        monkeypatch.setattr(FrozenModel, "states_at", states_at)

    return arm


@pytest.mark.parametrize("vocab_sample", [0, 400])
def test_bad_block_is_left_out_traced_and_kept(clean, tmp_path, poison, vocab_sample, capsys):
    config, bad = dataclasses.replace(clean.config, vocab_sample=vocab_sample), clean.blocks[4][2]
    poison(lambda ids: list(ids) == bad)
    train(config, tmp_path / "run")
    (file,) = (tmp_path / "run" / "bad-blocks").iterdir()
    assert file.name == "step-5-block-2.json"
    kept = json.loads(file.read_text())
    assert kept == {"cause": "the state at layer 1 is not finite", "input_ids": bad}
    assert "step 5 block 2 is left out: the state at layer 1" in capsys.readouterr().out
    assert progress(tmp_path / "run")["bad_blocks"] == 1
    lens = safetensors.torch.load(weights(tmp_path / "run"))
    other = safetensors.torch.load(weights(clean.folder))
    assert all(value.isfinite().all() for value in lens.values())
    assert not any(torch.equal(lens[name], other[name]) for name in lens)


def test_states_that_are_not_finite_are_not_cached(clean, tmp_path, poison):
    bad = clean.blocks[4][2]
    poison(lambda ids: list(ids) == bad)
    train(clean.config, tmp_path / "run", cache=CacheSettings(tmp_path / "cache"))
    files = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) > 30
    for file in files:
        assert all(value.isfinite().all() for value in safetensors.torch.load_file(file).values())


def test_number_that_is_bad_only_once_changes_nothing(clean, tmp_path, monkeypatch):
    original, calls = loop.accumulate_gradient, []

    def accumulate(lens, *args, **settings):
        kl = original(lens, *args, **settings)
        calls.append(1)
        if len(calls) == 3:
            lens.translator(1).weight.grad[2, 3] = torch.nan
        return kl

    monkeypatch.setattr(loop, "accumulate_gradient", accumulate)
    train(clean.config, tmp_path / "run")
    assert len(calls) == 9  # of 8 steps, one of them twice
    assert weights(tmp_path / "run") == weights(clean.folder)
    assert progress(tmp_path / "run")["bad_blocks"] == 0


def test_bad_loss_is_traced_to_its_layer(clean, tmp_path, monkeypatch):
    bad = clean.blocks[2][1]
    read, original, has_bad = FrozenModel.states_at, loop.accumulate_gradient, []

    def states_at(self, points, input_ids, attention_mask=None):
        has_bad[:] = [bad in input_ids.tolist()]
        return read(self, points, input_ids, attention_mask)

    def accumulate(lens, *args, **settings):
        kl = original(lens, *args, **settings)
        if has_bad[0]:
            lens.translator(1).weight.grad[2, 3] = torch.inf
        return kl

    monkeypatch.setattr(FrozenModel, "states_at", states_at)
    for module in (loop, bad_blocks):
        monkeypatch.setattr(module, "accumulate_gradient", accumulate)
    train(clean.config, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "bad-blocks" / "step-3-block-1.json").read_text())
    assert kept["cause"] == "the loss or its gradient at layer 1 is not finite"


def test_bad_block_of_the_first_pass_is_not_in_its_sums(config, tmp_path, poison, monkeypatch):
    config = dataclasses.replace(config, fit="closed-form", tokens=None, ridge=1e-3)
    seen, original = [], LeastSquares.add

    def add(self, hidden, final):
        seen.append(final.clone())
        original(self, hidden, final)

    monkeypatch.setattr(LeastSquares, "add", add)
    train(config, tmp_path / "clean")
    first, chosen = seen[0], []
    seen.clear()
    poison(lambda ids: bool(chosen.append(ids)) or ids == chosen[0])
    train(config, tmp_path / "run")
    assert torch.equal(seen[0], first[16:])
    assert progress(tmp_path / "run")["bad_blocks"] == 1
    assert (tmp_path / "run" / "bad-blocks" / "first-pass-0-block-1.json").exists()


@pytest.mark.parametrize("fit", ["sgd", "closed-form", "jacobian"])
def test_bad_held_out_block_is_in_no_metric(config, tmp_path, fit, capsys, monkeypatch):
    tokens = config.tokens if fit == "sgd" else None
    config = dataclasses.replace(config, fit=fit, tokens=tokens, ridge=1e-3, evaluate_tokens=150)
    held_out, original = [], loop.Run

    def make(*args):
        run = original(*args)
        held_out.append(tuple(run.validation_set._blocks[0].tolist()))
        return run

    monkeypatch.setattr(loop, "Run", make)
    embed = torch.nn.Embedding.forward

    def poisoned(self, ids):
        found = embed(self, ids)
        if ids.shape[-1] != 16 or not held_out:
            return found
        bad = torch.tensor([tuple(row.tolist()) == held_out[0] for row in ids])
        return torch.where(bad[:, None, None], torch.nan, found)

    monkeypatch.setattr(torch.nn.Embedding, "forward", poisoned)
    evaluation = train(config, tmp_path / "run")
    assert "held-out blocks are left out" in capsys.readouterr().out
    assert evaluation.tokens == 135


def test_too_many_bad_blocks_end_the_steps_and_the_lens_is_saved(config, tmp_path, poison, capsys):
    config = dataclasses.replace(config, tokens=6400)
    first, steps = [], []

    def is_chosen(ids):
        first.append(ids)
        return bool(steps) and ids[0] % 2 == 0

    poison(is_chosen)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: steps.append(1))
        train(config, tmp_path / "run")
    assert "the run ends with the last good lens" in capsys.readouterr().out
    found = progress(tmp_path / "run")
    assert 16 < found["bad_blocks"] <= 20
    assert found["tokens"] < 6400
    assert "blocks had numbers that are not finite" in found["ended_early"]
    assert found["history"][-1]["kl_nats"] < found["history"][0]["kl_nats"]


def test_run_that_ended_early_is_extended(clean, tmp_path):
    shutil.copytree(clean.folder, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    manifest = json.loads(path.read_text())
    manifest["progress"] |= {"bad_blocks": 17, "ended_early": "17 blocks had bad numbers"}
    path.write_text(json.dumps(manifest))
    train(dataclasses.replace(clean.config, tokens=640), tmp_path / "run", resume=True)
    found = progress(tmp_path / "run")
    assert (found["tokens"], found["bad_blocks"], found["ended_early"]) == (640, 17, None)


def test_card_says_what_went_wrong(clean):
    manifest = json.loads((clean.folder / "config.json").read_text())
    card = report.card("run", manifest)
    assert "ended early" not in card
    assert "left out" not in card
    manifest["progress"] |= {"bad_blocks": 17, "ended_early": "17 blocks had bad numbers"}
    lines = report.card("run", manifest).splitlines()
    assert "- The steps ended early: 17 blocks had bad numbers." in lines
    assert "- Blocks left out because of values that are not finite: 17." in lines


def _count_bad_blocks(config, folder):
    """The bad blocks that a process knows of, if process 0 reads two in the first pass."""
    read, finish, calls, counts = FrozenModel.states_at, loop.finish, [], []

    def states_at(self, points, input_ids, attention_mask=None):
        states = read(self, points, input_ids, attention_mask)
        calls.extend([1] * (len(input_ids) == 2))
        is_bad = os.environ["RANK"] == "0" and len(input_ids) == 2 and len(calls) == 1
        return [state * torch.nan for state in states] if is_bad else states

    def count(run, state, *rest):
        counts.append(state.progress.bad_blocks)
        return finish(run, state, *rest)

    FrozenModel.states_at, loop.finish = states_at, count
    train(config, folder)
    return counts


def test_processes_know_of_each_others_bad_blocks(config, tmp_path):
    assert in_two_processes(_count_bad_blocks, config, tmp_path / "run") == [[2], [2]]


def _train_with_faults(config, folder, bad_state, bad_loss):
    """Train with a block whose states are NaN and one whose gradient at layer 1 is."""
    read, step, in_step = FrozenModel.states_at, loop._accumulate, []

    def states_at(self, points, input_ids, attention_mask=None):
        states = read(self, points, input_ids, attention_mask)
        if len(input_ids) == 1:  # one block at a time, in the search
            in_step[:] = input_ids.tolist()
        for row, ids in enumerate(input_ids.tolist()):
            for point, state in zip(points, states, strict=True):
                if ids == bad_state and point.layer >= 2:
                    state[row] = torch.nan
        return states

    def accumulate(run, state, input_ids, active):
        in_step[:] = input_ids.tolist()
        kl = step(run, state, input_ids, active)
        ruin(state.optimizer.lens)
        return kl

    def accumulate_one(lens, *args, **settings):
        kl = accumulate_gradient(lens, *args, **settings)
        ruin(lens)
        return kl

    def ruin(lens):
        if bad_loss in in_step and 1 in lens.layers:
            lens.translator(1).weight.grad[2, 3] = torch.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenModel, "states_at", states_at)
        patch.setattr(loop, "_accumulate", accumulate)
        patch.setattr(bad_blocks, "accumulate_gradient", accumulate_one)
        return [result.value for result in train(config, folder).results]


def test_bad_blocks_of_divided_layers_are_those_of_one_process(clean, tmp_path):
    blocks = [block for step in clean.blocks for block in step]
    bad_state, bad_loss = (
        next(block for block in clean.blocks[step] if blocks.count(block) == 1) for step in (4, 2)
    )
    bad = bad_state, bad_loss
    divided = dataclasses.replace(clean.config, shard_layers=True)
    alone = _train_with_faults(clean.config, tmp_path / "one", *bad)
    for values in in_two_processes(_train_with_faults, divided, tmp_path / "two", *bad):
        assert values == pytest.approx(alone, rel=1e-5, abs=1e-7)
    kept = [
        {file.name: file.read_text() for file in (tmp_path / name / "bad-blocks").iterdir()}
        for name in ("one", "two")
    ]
    assert kept[0] == kept[1]
    assert [json.loads(text)["cause"] for _, text in sorted(kept[0].items())] == [
        "the loss or its gradient at layer 1 is not finite",
        "the state at layer 2 is not finite",
    ]


def test_steps_that_blow_up_leave_the_closed_form(config, tmp_path):
    closed = dataclasses.replace(config, fit="closed-form", tokens=None)
    train(closed, tmp_path / "closed")
    train(dataclasses.replace(config, lr=1e30), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "closed")
    assert not (tmp_path / "run" / "state").exists()


def test_state_and_lens_that_are_not_finite_are_not_written(tmp_path):
    checkpoint.save_state(tmp_path, checkpoint.State({"a": torch.ones(2)}, {}))
    with pytest.raises(InputError, match=r"is not finite \(a\)"):
        checkpoint.save_state(tmp_path, checkpoint.State({"a": torch.tensor([1, torch.nan])}, {}))
    assert torch.equal(checkpoint.load_state(tmp_path).tensors["a"], torch.ones(2))


# States


def test_no_flipped_bit_of_a_state_is_taken(tmp_path):
    tensors = {"a": torch.randn(30), "b": torch.randn(2, 3)}
    checkpoint.save_state(tmp_path, checkpoint.State(tensors, {"step": 3}))
    (path,) = (tmp_path / "state").iterdir()
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            state = checkpoint.load_state(tmp_path)
        except InputError:
            continue
        assert state.metadata["step"] == 3
        assert all(torch.equal(state.tensors[name], value) for name, value in tensors.items())


def interrupted(config, folder, monkeypatch):
    """A run that was stopped in its fifth step, after it had been saved in every step."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_SECONDS_PER_SAVE", -1)
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(config, folder)


def test_run_goes_on_from_the_state_before_a_damaged_one(clean, config, tmp_path, monkeypatch):
    interrupted(config, tmp_path / "run", monkeypatch)
    older, newest = sorted(
        (tmp_path / "run" / "state").iterdir(), key=lambda path: path.stat().st_mtime
    )
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*earlier.*{older.name}"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(clean.folder)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.0),
        torch.ones(3, 16, 17, dtype=torch.float64),
        torch.full((3, 16, 17), torch.nan),
    ],
)
def test_state_with_other_tensors_is_refused(config, tmp_path, monkeypatch, value):
    interrupted(config, tmp_path / "run", monkeypatch)
    tensors, metadata = checkpoint.load_state(tmp_path / "run")
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda _: torch.ones(1, dtype=torch.bool))
    checkpoint.save_state(
        tmp_path / "run", checkpoint.State(tensors | {"momentum": value}, metadata)
    )
    monkeypatch.undo()
    with pytest.raises(InputError, match="momentum is"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)


# Other runs in the same folder


def test_folder_of_a_run_is_closed_to_every_other_run(config, tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(InputError, match=rf'in use by another run .*"pid": {os.getpid()}'):
            train(config, tmp_path / "run")
        with pytest.raises(InputError, match="in use by another run"):
            train(config, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_lock_of_a_killed_process_is_free(tmp_path):
    child = os.fork()
    if child == 0:
        _file = _acquire(tmp_path / "run")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_in_a_step_is_acknowledged_at_once_and_saves(
    config, tmp_path, monkeypatch, capfd, name
):
    heard = []

    def send():
        os.kill(os.getpid(), getattr(signal, name))
        heard.append(capfd.readouterr().err)

    at_step(monkeypatch, 3, send)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    assert "stopping after this step" in heard[0]
    assert checkpoint.has_state(tmp_path / "run")


@pytest.mark.parametrize("fit", ["closed-form", "jacobian", "preconditioned"])
def test_signal_in_the_first_pass_ends_it(config, tmp_path, monkeypatch, fit):
    tokens = config.tokens if fit == "preconditioned" else None
    config = dataclasses.replace(config, fit=fit, tokens=tokens, init_tokens=10**6)
    read, calls = FrozenModel.residual_stream, []

    def stream(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(FrozenModel, "residual_stream", stream)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    assert len(calls) < 30
    assert not (tmp_path / "run").exists()


def test_interrupt_while_the_table_is_made_keeps_the_run(clean, config, tmp_path, monkeypatch):

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tunedlens.training.validation.ValidationSet.score", interrupt)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(clean.folder)
    train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "README.md").exists()


# Disks, readers, memory


def test_full_disk_loses_no_finished_fit(clean, config, tmp_path, monkeypatch):
    original = files.write

    def write(path, content):
        if (tmp_path / "run") in path.parents:
            raise InputError(f"cannot write {path}: No space left on device")
        original(path, content)

    for module in (checkpoint.lens_files, checkpoint.run_state):
        monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InputError, match=r"No space left on device; the lens is in"):
        train(config, tmp_path / "run")
    (spare,) = tmp_path.glob("run-*")
    assert weights(spare) == weights(clean.folder)


def test_run_that_cannot_be_saved_on_the_way_goes_on(config, tmp_path, monkeypatch, capsys):
    def save(*_):
        raise InputError("No space left on device")

    monkeypatch.setattr(loop, "_SECONDS_PER_SAVE", -1)
    monkeypatch.setattr(checkpointing, "save", save)
    train(config, tmp_path / "run")
    assert "continues without being saved: No space left" in capsys.readouterr().out
    assert (tmp_path / "run" / "README.md").exists()


def test_reader_that_fails_leaves_a_run_that_goes_on(clean, config, tmp_path, monkeypatch):
    original = PackedCorpus.batches

    def batches(self, *args):
        for index, batch in enumerate(original(self, *args)):
            if index == 6:
                raise InputError("cannot read on: connection reset")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(PackedCorpus, "batches", batches)
        with pytest.raises(InputError, match="cannot read on"):
            train(config, tmp_path / "run")
    train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(clean.folder)


def _nobody_reads():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize(
    "make",
    [_nobody_reads, lambda: None, lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii")],
    ids=["head", "closed", "ascii"],
)
def test_run_goes_on_whatever_becomes_of_its_messages(config, tmp_path, monkeypatch, make):
    flags = f"--model {config.model.model} --dataset {config.corpus.dataset} --device cpu"
    flags += f" --output {tmp_path / 'run'} --seq-len 16 --tokens 256 --batch-size 4"
    flags += " --evaluate-tokens 60 --init-tokens 128"
    monkeypatch.setattr(sys, "stdout", make())
    assert train_command([*flags.split(), "--precision", "fp32", "--kernel", "products"]) == 0
    assert (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize("flag", ["batch_size", "micro_batch_size"])
def test_batch_that_no_machine_holds_is_refused(flag):
    with pytest.raises(
        InputError, match=rf"--{flag.replace('_', '-')} must be .* got 1000000000000"
    ):
        TrainConfig(**{flag: 10**12})


def test_step_whose_states_do_not_fit_into_memory_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(resolving, "_memory_bytes", lambda _: 10**9)
    config = dataclasses.replace(config, batch_size=2**20, vocab_sample=400)
    with pytest.raises(InputError, match=r"holds .* GB .* give a smaller --batch-size"):
        train(config, tmp_path / "run")


# Other processes


def _lose_a_process(flags):
    """What a command prints and returns when the other process leaves in the third step."""
    is_lost, errors = os.environ["RANK"] == "1", io.StringIO()

    def leave():
        torch.distributed.destroy_process_group()
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        if is_lost:
            at_step(patch, 3, leave)
        with contextlib.suppress(SystemExit):
            return train_command(flags), errors.getvalue()


def test_process_ends_in_one_line_when_another_one_is_lost(config, tmp_path):
    flags = ["--model", config.model.model, "--dataset", config.corpus.dataset, "--device", "cpu"]
    flags += ["--seq-len", "16", "--tokens", "512", "--init-tokens", "128", "--batch-size", "4"]
    flags += ["--precision", "fp32", "--kernel", "products", "--evaluate-tokens", "60"]
    found = in_two_processes(_lose_a_process, [*flags, "--output", str(tmp_path / "run")])
    ((status, message),) = (result for result in found if result is not None)
    assert status == 1
    assert "error: another process has ended or does not answer (" in message.splitlines()[-1]
