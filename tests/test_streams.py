"""Streams of text: shared by processes, put in random order, resumed, cut off."""

import contextlib
import dataclasses
import json
import os

import pytest
from conftest import in_two_processes, make_gpt2, short_run
from transformers import AutoTokenizer

from tunedlens import CorpusConfig, InputError, builtin, checkpoint, train
from tunedlens.checkpoint import saved_config
from tunedlens.corpus import Packer, StreamedCorpus, TextRanOutError, load_splits, resolve_corpus
from tunedlens.distributed import join_processes
from tunedlens.fit import LeastSquares, PreconditionedMuon

ROWS = [f"row {i}: {'über ' * (i % 17)}{i * i} is the square of {i}\n" for i in range(400)]
WINDOWS = [0, 7, 32]


def load(path, streaming=True):
    config = resolve_corpus(
        CorpusConfig(dataset=str(path), seq_len=8, streaming=streaming), "a model", None
    )
    return load_splits(config, AutoTokenizer.from_pretrained(builtin.FOLDER))


def batches(path, window, position=None, seed=0):
    """All batches of 3 blocks, as lists, with their positions."""
    found = []
    with contextlib.suppress(TextRanOutError):
        for batch in load(path).train.batches(3, seed, position, window):
            found.append((batch.input_ids.tolist(), json.loads(json.dumps(batch.position))))
    return found


def rows_of(found):
    return [row for rows, _ in found for row in rows]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("streams") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ROWS))
    return path


@pytest.fixture(scope="module")
def alone(rows):
    """What one process reads, with each window."""
    return {window: batches(rows, window) for window in WINDOWS}


@pytest.mark.parametrize("window", WINDOWS[1:])
def test_shuffled_stream_has_the_same_blocks_in_another_order(alone, window):
    in_order, shuffled = rows_of(alone[0]), rows_of(alone[window])
    assert shuffled != in_order
    assert sorted(shuffled) == sorted(in_order)
    size = -(-window // 3) * 3
    for start in range(0, len(in_order), size):
        part = slice(start, start + size)
        assert sorted(shuffled[part]) == sorted(in_order[part])
    first, second = (
        [in_order[start : start + size].index(row) for row in shuffled[start : start + size]]
        for start in (0, size)
    )
    assert first != second  # every window has an order of its own


def test_order_of_a_stream_depends_on_the_seed(rows, alone):
    assert rows_of(batches(rows, 32, seed=1)) != rows_of(alone[32])


@pytest.mark.parametrize("window", WINDOWS)
def test_stream_goes_on_from_every_position(rows, alone, window):
    unbroken = alone[window]
    for stop in (0, 2, 11, 40, len(unbroken) - 2):
        resumed = batches(rows, window, unbroken[stop][1])
        assert rows_of(resumed) == rows_of(unbroken[stop + 1 :])


def _read_by_two(path, positions):
    """The batches of all windows and after the positions of one process; the texts tokenised."""
    join_processes("cpu")
    encode, texts = Packer.encode, []

    def count(self, some):
        texts.extend(some)
        return encode(self, some)

    Packer.encode = count
    whole = [block.tolist() for block in load(path, streaming=False).train.blocks()]
    tokenised = list(texts)
    found = {window: batches(path, window) for window in WINDOWS}
    resumed = {window: batches(path, window, positions[window]) for window in WINDOWS}
    return whole, tokenised, found, resumed


@pytest.fixture(scope="module")
def by_two(rows, alone):
    """What each of two processes reads."""
    positions = {window: alone[window][20][1] for window in WINDOWS}
    return in_two_processes(_read_by_two, rows, positions)


def test_processes_have_the_blocks_of_one_and_share_their_tokenisation(rows, by_two):
    expected = [block.tolist() for block in load(rows, streaming=False).train.blocks()]
    assert [whole for whole, *_ in by_two] == [expected, expected]
    one, two = (texts for _, texts, *_ in by_two)
    assert sorted(one + two) == sorted(ROWS)
    assert abs(len(one) - len(two)) < 2


@pytest.mark.parametrize("window", WINDOWS)
def test_stream_of_two_processes_is_that_of_one(rows, alone, by_two, window):
    for _, _, found, resumed in by_two:
        assert rows_of(found[window]) == rows_of(alone[window])
        assert rows_of(resumed[window]) == rows_of(alone[window][21:])
        for stop in (12, 20, 41):  # two have stopped, one goes on
            rest = batches(rows, window, found[window][stop][1])
            assert rows_of(rest) == rows_of(alone[window][stop + 1 :])


@pytest.fixture(scope="module")
def config(rows):
    """A short run on the stream."""
    folder = rows.parent / "tiny"
    make_gpt2().save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin.FOLDER).save_pretrained(folder)
    corpus = CorpusConfig(dataset=str(rows), seq_len=16, streaming=True)
    return short_run(
        folder, rows, corpus=corpus, tokens=2400, init_tokens=320, shuffle_window=8, batch_size=5
    )


def _fail_to_read(config, folder, function):
    """The error of a run, if process 1 cannot read the text after the third call of a function."""
    owner, name = function
    original, read, calls = getattr(owner, name), StreamedCorpus._texts, []

    def call(self, *args):
        calls.append(1)
        return original(self, *args)

    def texts(self):
        for run in read(self):
            if os.environ.get("RANK") == "1" and len(calls) >= 3:
                raise InputError("connection reset")
            yield run

    setattr(owner, name, call)
    StreamedCorpus._texts = texts
    try:
        train(config, folder)
    except InputError as error:
        return str(error)


ERRORS = ["connection reset", "process 1: connection reset"]


def test_reader_that_fails_in_one_process_ends_all_and_the_run_goes_on(config, tmp_path):
    expected = train(config, tmp_path / "unbroken")
    step = (PreconditionedMuon, "step")
    assert sorted(in_two_processes(_fail_to_read, config, tmp_path / "run", step)) == ERRORS
    assert checkpoint.has_state(tmp_path / "run")
    evaluation = train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    for one, other in zip(evaluation.results, expected.results, strict=True):
        if one.metric == "kl_nats":
            assert one.value == pytest.approx(other.value, rel=1e-5)


def _fail_to_begin(config, folder):
    """The errors of runs for which process 1 has no text in the first pass, or no file at all."""
    errors = [_fail_to_read(config, folder, (LeastSquares, "add"))]
    if os.environ["RANK"] == "1":
        corpus = dataclasses.replace(config.corpus, dataset=str(folder / "none.jsonl"))
        config = dataclasses.replace(config, corpus=corpus)
    try:
        train(config, folder)
    except InputError as error:
        return [*errors, str(error)]


def test_process_that_cannot_begin_ends_all(config, tmp_path):
    config = dataclasses.replace(config, init_tokens=2400)
    found = in_two_processes(_fail_to_begin, config, tmp_path / "run")
    assert sorted(errors[0] for errors in found) == ERRORS
    assert all("none.jsonl: there is no such file" in errors[1] for errors in found)
    assert not checkpoint.has_state(tmp_path / "run")


def _read_another_text(path, other):
    join_processes("cpu")
    with pytest.raises(InputError, match="is not the same in all processes"):
        list(load(other if os.environ["RANK"] == "1" else path).train.blocks())


def test_processes_that_read_different_texts_are_refused(rows, tmp_path):
    other = tmp_path / "rows.jsonl"
    other.write_text(rows.read_text().replace("row 300", "line 300"))
    in_two_processes(_read_another_text, rows, other)


def test_order_of_a_text_in_memory_is_not_asked_for(config, tmp_path):
    corpus = dataclasses.replace(config.corpus, streaming=False)
    with pytest.raises(InputError, match="--shuffle-window works only with --streaming"):
        train(dataclasses.replace(config, corpus=corpus), tmp_path / "run")


def test_lens_depends_on_the_order_of_the_stream(config, tmp_path):
    lenses = []
    for window in (0, 8):
        train(dataclasses.replace(config, shuffle_window=window), tmp_path / str(window))
        lenses.append((tmp_path / str(window) / "lens.safetensors").read_bytes())
    assert lenses[0] != lenses[1]
