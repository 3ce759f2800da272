import contextlib
import copy
import csv
import json
import random

import pytest
import torch
from conftest import make_sentence_piece

from tunedlens import CorpusConfig, InputError, builtin
from tunedlens.corpus import Packer, documents, load_splits, pieces, resolve_corpus
from tunedlens.corpus.standard_library import standard_library
from tunedlens.tokenizer import TokenBytes

TEXTS = [f"document {i}: über {'x' * i}\r\n\ttabs, 日本 🎉\n" for i in range(40)]


def load(tokenizer, dataset, seq_len=16, **settings):
    config = CorpusConfig(dataset=str(dataset), seq_len=seq_len, **settings)
    return load_splits(resolve_corpus(config, "a model", None), tokenizer)


def whole(splits):
    """All blocks of both sides, as one list of ids."""
    return torch.cat([*splits.train.blocks(), *splits.validation.blocks()]).tolist()


def test_one_file_is_read_byte_for_byte(tokenizer, tmp_path):
    raw = "".join(TEXTS).encode() + b"\xef\xbb\xbf\r\r\n<|endoftext|> "
    (tmp_path / "a.txt").write_bytes(raw)
    stream = Packer(tokenizer, 32).encode([raw.decode()])[0]
    assert tokenizer.decode(stream[:-1]).encode() == raw
    splits = load(tokenizer, tmp_path / "a.txt", seq_len=len(stream) // 2)
    assert splits.train.about["bytes"] == len(raw)
    assert splits.train.about["tokens"] == len(stream)


def test_text_that_spells_out_eos_is_text(tokenizer):
    (ids,) = Packer(tokenizer, 32).encode(["a<|endoftext|>b"])
    assert ids.tolist().count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


def test_token_bytes_add_up_to_the_text(tokenizer):
    counts = TokenBytes.of(tokenizer, 5000)
    for text, ids in zip(TEXTS, Packer(tokenizer, 32).encode(TEXTS), strict=True):
        assert counts.next_bytes(torch.cat([ids[-1:], ids]).long()).sum() == len(text.encode())


def test_bytes_of_a_long_document_are_counted_in_parts(tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "_TOKENS_AT_A_TIME", 7)
    packer = Packer(tokenizer, 32)
    for text, ids in zip(TEXTS, packer.encode(TEXTS), strict=True):
        assert packer.count_bytes(torch.cat([ids[-1:], ids])) == len(text.encode())


def test_blocks_are_the_documents_joined_by_eos_without_loss(tokenizer, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02}.txt").write_text(text, newline="")
    splits = load(tokenizer, tmp_path)
    for side in splits.train, splits.validation:
        ids = torch.cat(list(side.blocks()))
        documents = tokenizer.decode(ids).split("<|endoftext|>")
        assert set(documents[:-1]) <= set(TEXTS)
        assert side.about["tokens"] == len(ids) + side.about["dropped_tokens"]
        assert side.about["dropped_tokens"] < 16


def awkward_text(rng):
    """Runs of one letter, spaces or newlines, letters of several bytes, words, special tokens."""
    parts = [
        lambda: "the quick brown fox jumps over a lazy dog ",
        lambda: rng.choice("a0 \n=") * rng.randrange(1, 300),
        lambda: "日本語🎉é" * rng.randrange(1, 40),
        lambda: "".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(100)),
        lambda: "<|endoftext|></s>",
    ]
    return "".join(rng.choice(parts)() for _ in range(60))


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("name", ["byte-level", "Prepend", "Metaspace", None])
def test_tokens_of_a_text_in_pieces_are_those_of_the_whole(tokenizer, monkeypatch, name, is_chat):
    if name != "byte-level":
        tokenizer = make_sentence_piece(name)
    monkeypatch.setattr(pieces, "PIECE", 400)
    monkeypatch.setattr(pieces, "OVERLAP", 64)
    rng = random.Random(0)
    texts = [awkward_text(rng) for _ in range(10)]
    found = pieces.token_ids(tokenizer, ["short", *texts, ""], is_chat)
    whole = tokenizer(texts, add_special_tokens=False, split_special_tokens=not is_chat)
    assert [ids.tolist() for ids in found[1:-1]] == whole["input_ids"]
    assert found[-1].tolist() == []


def test_tokenizer_never_sees_a_long_text_at_once(tokenizer, monkeypatch):
    lengths, original = [], type(tokenizer).__call__

    def call(self, text, **settings):
        lengths.append(len(text))
        return original(self, text, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    (ids,) = pieces.token_ids(tokenizer, ["x = [1, 2]  # 日本\n" * 30_000], False)
    assert len(ids) > 100_000
    assert max(lengths) <= pieces.PIECE


def test_long_text_that_cannot_be_cut_is_refused(tokenizer, monkeypatch):
    for name, value in {"PIECE": 64, "OVERLAP": 16, "MAX_PIECE": 1024}.items():
        monkeypatch.setattr(pieces, name, value)
    monkeypatch.setattr(pieces._Tokens, "__eq__", lambda *_: False)
    with pytest.raises(InputError, match="cannot be cut after character 0"):
        pieces.token_ids(tokenizer, ["a b c " * 1000], False)


def test_sides_share_no_document(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    splits = load(tokenizer, path, seq_len=4)
    train, validation = (
        set(tokenizer.decode(torch.cat(list(side.blocks()))).split("<|endoftext|>")[:-1])
        for side in (splits.train, splits.validation)
    )
    assert train
    assert validation
    assert not train & validation


def test_sides_of_a_single_document_share_no_block(tokenizer, text_file):
    splits = load(tokenizer, text_file)
    train, validation = (
        {tuple(block.tolist()) for block in side.blocks()}
        for side in (splits.train, splits.validation)
    )
    assert not train & validation
    assert splits.train.about["blocks"] + splits.validation.about["blocks"] == (
        splits.train.about["tokens"] // 16
    )


def test_a_few_documents_always_leave_one_held_out(tokenizer, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.md").write_text(f"{i} " * 100)
    splits = load(tokenizer, tmp_path)
    assert splits.train.about["documents"] == splits.validation.about["documents"] == 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_tokens(tokenizer, tmp_path, kind):
    texts = [*TEXTS, "NA", "null", "123"]
    path = tmp_path / f"rows.{kind}"
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (tmp_path / "plain").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "plain" / f"{i:02}.txt").write_text(text, newline="")
    assert whole(load(tokenizer, path)) == whole(load(tokenizer, tmp_path / "plain"))


def test_streaming_gives_the_blocks_of_the_whole(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 5))
    assert whole(load(tokenizer, path)) == whole(load(tokenizer, path, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_go_on_from_a_position_as_if_never_stopped(tokenizer, tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": text + str(i)}) for i, text in enumerate(TEXTS * 9))
    )

    def batches(position=None):
        corpus = load(tokenizer, path, streaming=streaming).train
        return corpus.batches(3, seed=0, position=position)

    unbroken = [batch for batch, _ in zip(batches(), range(40), strict=False)]
    for stop in (0, 7, 20):
        position = json.loads(json.dumps(unbroken[stop].position))
        resumed = next(batches(position))
        assert torch.equal(resumed.input_ids, unbroken[stop + 1].input_ids)


def test_batches_pass_over_every_block_once_before_any_comes_again(tokenizer, text_file):
    corpus = load(tokenizer, text_file).train
    count = corpus.about["blocks"]
    rows = torch.cat(
        [b.input_ids for b, _ in zip(corpus.batches(1, 0), range(2 * count), strict=False)]
    )
    everything = sorted(map(tuple, torch.stack(list(corpus.blocks())).tolist()))
    first, second = rows[:count].tolist(), rows[count:].tolist()
    assert sorted(map(tuple, first)) == sorted(map(tuple, second)) == everything
    assert first != second


def test_batches_depend_on_the_seed(tokenizer, text_file):
    corpus = load(tokenizer, text_file).train
    one, other = (next(corpus.batches(8, seed)).input_ids for seed in (0, 1))
    assert not torch.equal(one, other)


def test_stream_that_runs_out_says_so(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    with pytest.raises(InputError, match="ran out"):
        list(load(tokenizer, path, streaming=True).train.batches(4, 0))


def test_glob_and_text_column_choose_what_is_read(tokenizer, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02}.jsonl").write_text(json.dumps({"title": "no", "body": text}))
    (tmp_path / "other.txt").write_text("not this")
    splits = load(tokenizer, f"{tmp_path}/*.jsonl", text_column="body")
    assert splits.train.about["documents"] + splits.validation.about["documents"] == len(TEXTS)


def test_embedded_text_is_split_by_path_and_has_no_tests(tokenizer):
    train, validation = standard_library("train"), standard_library("validation")
    paths = [file.path for file in train + validation]
    assert len(paths) == len(set(paths))
    assert "json/decoder.py" in paths
    assert not any("test" in path.split("/") or "site-packages" in path for path in paths)
    splits = load(tokenizer, builtin.NAME, seq_len=512)
    assert splits.validation.about["bytes"] == sum(len(f.text.encode()) for f in validation)


def test_another_model_streams_a_web_corpus_by_default(tiny):
    config = resolve_corpus(CorpusConfig(), tiny.name, tiny.context)
    assert config.streaming
    assert "openwebtext" in str(config.dataset)


def test_texts_without_text_are_passed_over(tokenizer, tmp_path):
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "plain.jsonl").write_text("\n".join(rows))
    (tmp_path / "gaps.jsonl").write_text("\n".join(['{"text": null}', '{"text": ""}', *rows]))
    assert whole(load(tokenizer, tmp_path / "gaps.jsonl")) == (
        whole(load(tokenizer, tmp_path / "plain.jsonl"))
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_may_hold_texts_and_rows(tokenizer, tmp_path, streaming):
    (tmp_path / "a.md").write_text(TEXTS[0] * 9)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    splits = load(tokenizer, tmp_path, seq_len=4, streaming=streaming)
    ids = torch.cat([*splits.train.blocks(), *splits.validation.blocks()])
    assert TEXTS[0] * 2 in tokenizer.decode(ids)
    assert TEXTS[30] in tokenizer.decode(ids)


def test_blocks_are_split_where_the_documents_are_too_small(tokenizer, tmp_path):
    (tmp_path / "long.txt").write_text("".join(TEXTS))
    (tmp_path / "tiny.txt").write_text("tiny")
    splits = load(tokenizer, tmp_path)
    assert splits.train.about["documents"] == 2
    assert splits.train.about["blocks"] > splits.validation.about["blocks"] > 0


def test_blocks_that_are_all_alike_are_split_too(tokenizer, tmp_path):
    (tmp_path / "same.txt").write_text("0\n" * 1600)
    splits = load(tokenizer, tmp_path / "same.txt", seq_len=2)
    assert splits.train.about["blocks"] > 0
    assert splits.validation.about["blocks"] > 0


def test_local_file_streams_as_it_would_be_read(tokenizer, text_file):
    assert whole(load(tokenizer, text_file, streaming=True)) == whole(load(tokenizer, text_file))


def test_stream_counts_what_it_has_read(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text + str(i)}) for i, text in enumerate(TEXTS)))
    corpus = load(tokenizer, path, seq_len=4, streaming=True).train
    with pytest.raises(InputError, match="ran out"):
        list(corpus.batches(1, 0))
    expected = load(tokenizer, path, seq_len=4).train.about
    for figure in ("documents", "bytes", "tokens"):
        assert corpus.about[figure] == expected[figure]


def test_block_longer_than_the_context_is_refused(tiny):
    with pytest.raises(InputError, match="at most 32, the context of tiny; got 64"):
        resolve_corpus(CorpusConfig(seq_len=64), tiny.name, tiny.context)


def bad(tmp_path, name, content=b""):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_bad_text_is_refused_with_a_reason(tokenizer, tmp_path, text_file):
    rows = b'{"a": "x", "b": "y", "n": 1}\n'
    cases = [
        (tmp_path / "missing.txt", {}, "no such file"),
        (bad(tmp_path, "empty.txt"), {}, "is empty"),
        (bad(tmp_path, "short.txt", b"a few words"), {}, "less than one block of 16"),
        (bad(tmp_path, "one.txt", b"word " * 18), {}, "at least two"),
        (bad(tmp_path, "latin.txt", b"caf\xe9 " * 99), {}, "not UTF-8 .byte 3 is 0xe9"),
        (bad(tmp_path, "picture.png"), {}, "expected a file of a kind"),
        (bad(tmp_path, "rows.jsonl", rows), {}, "choose one with --text-column"),
        (bad(tmp_path, "r.jsonl", rows), {"text_column": "c"}, "no column 'c'; it has a, b, n"),
        (bad(tmp_path, "s.jsonl", rows), {"text_column": "n"}, "'n' .* holds no text"),
        (bad(tmp_path, "torn.jsonl", b'{"a": '), {}, "cannot read the dataset"),
        (bad(tmp_path, "torn.parquet", b"PAR1"), {}, "cannot read the dataset"),
        (text_file, {"validation_split": "validation"}, "works only with datasets on the hub"),
        (text_file, {"dataset_config": "en"}, "works only with datasets on the hub"),
        ("hub/name", {"validation_split": "train"}, "must differ from --dataset-split"),
        ("x" * 300, {}, "cannot look for files"),
        ("~nosuchuser/x.txt", {}, "cannot look for files"),
    ]
    for path, settings, message in cases:
        with pytest.raises(InputError, match=message):
            whole(load(tokenizer, path, **settings))


def test_position_near_the_end_of_a_stream_resumes_too(tokenizer, tmp_path):
    path = tmp_path / "rows.parquet"
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"{text}{i}"} for i, text in enumerate(TEXTS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def batches(position=None):
        return load(tokenizer, path, seq_len=4, streaming=True).train.batches(2, 0, position)

    unbroken = []
    with contextlib.suppress(InputError):  # when it runs out
        for batch in batches():
            unbroken.append(batch)
    assert torch.equal(next(batches(unbroken[-2].position)).input_ids, unbroken[-1].input_ids)


@pytest.mark.network
def test_hub_dataset_is_read_with_a_named_validation_split(tokenizer):
    splits = load(
        tokenizer,
        "Salesforce/wikitext",
        dataset_config="wikitext-2-raw-v1",
        validation_split="validation",
    )
    assert splits.validation.about["documents"] < splits.train.about["documents"]


def test_block_starts_with_bos_where_the_tokenizer_has_one(sentence_piece, tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS), newline="")
    config = CorpusConfig(dataset=str(tmp_path), seq_len=16)
    resolved = resolve_corpus(config, "a model", None, has_bos=True)
    with_bos = load_splits(resolved, sentence_piece)
    without = load(sentence_piece, tmp_path, seq_len=15, bos=False)
    assert resolved.bos is True
    for side in ("train", "validation"):
        blocks = torch.stack(list(getattr(with_bos, side).blocks()))
        assert blocks[:, 0].eq(sentence_piece.bos_token_id).all()
        assert not blocks[:, 1:].eq(sentence_piece.bos_token_id).any()
    everything = [
        torch.cat([*splits.train.blocks(), *splits.validation.blocks()])
        for splits in (with_bos, without)
    ]
    text = everything[0].view(-1, 16)[:, 1:]
    assert sorted(map(tuple, text.tolist())) == sorted(
        map(tuple, everything[1].view(-1, 15).tolist())
    )


def test_streamed_block_starts_with_bos_too(sentence_piece, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    whole, streamed = (load(sentence_piece, path, bos=True, streaming=s) for s in (False, True))
    blocks = list(streamed.train.blocks())
    assert torch.equal(torch.stack(blocks), torch.stack(list(whole.train.blocks())))
    batch = next(streamed.train.batches(3, seed=0))
    assert torch.equal(batch.input_ids, torch.stack(blocks[:3]))


def test_bos_that_a_tokenizer_does_not_have_is_refused(tokenizer, text_file):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="has no BOS token; leave out --bos"):
        load(tokenizer, text_file, bos=True)
