import pytest
import torch
from conftest import make_sentence_piece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunedlens.tokenizer import (
    TokenBytes,
    as_text,
    beginning_of_sequence,
    shown,
    token_bytes,
)

TEXTS = ["the naïve 日本 ☃ x\n\ty", "line  two\r\n", "🎉", "a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" return", ["␣return"]),
        ("\n    x", ["↵␣␣␣", "␣x"]),
        ("\t", ["⇥"]),
        ("é", ["⟨c3⟩", "⟨a9⟩"]),
        ("$x$", ["$", "x", "$"]),
    ],
)
def test_white_space_is_visible_and_half_characters_are_bytes(tokenizer, text, words):
    ids = tokenizer(text)["input_ids"]
    assert [shown(tokenizer, i) for i in ids] == words


def test_bytes_of_all_tokens_are_those_of_the_text(tokenizer):
    text = "日本 🎉"
    words = [shown(tokenizer, i) for i in tokenizer(text)["input_ids"]]
    found = b"".join(
        bytes.fromhex(word[1:-1]) if word[0] == "⟨" else word.replace("␣", " ").encode()
        for word in words
    )
    assert found == text.encode()


def next_bytes(tokenizer, text, vocab_size=None):
    """Bytes of each token of a text in the middle of a block: between two EOS."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    counts = TokenBytes.of(tokenizer, vocab_size or len(tokenizer))
    return counts.next_bytes(torch.tensor([eos, *ids, eos]))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prefix", ["Prepend", "Metaspace", None])
def test_bytes_of_sentence_piece_are_exact(prefix, text):
    tokenizer = make_sentence_piece(prefix)
    counts = next_bytes(tokenizer, text, vocab_size=len(tokenizer) + 5)
    assert counts.sum() == len(text.encode())
    assert counts[-1] == 0  # EOS


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_byte_level_bpe_are_exact(tokenizer, text):
    assert next_bytes(tokenizer, text).sum() == len(text.encode())


def test_bytes_of_sentence_piece_tokens_make_the_text():
    tokenizer = make_sentence_piece(None)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode()


def test_sentence_piece_tokens_keep_their_spaces_and_bytes():
    tokenizer = make_sentence_piece()
    ids = tokenizer("the ☃", add_special_tokens=False)["input_ids"]
    assert [shown(tokenizer, i) for i in ids][-3:] == ["⟨e2⟩", "⟨98⟩", "⟨83⟩"]
    assert as_text(tokenizer, ids[0]).startswith(" ")
    assert shown(tokenizer, tokenizer.bos_token_id) == "<s>"


def test_bytes_of_a_tokenizer_that_drops_text_are_unknown():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert TokenBytes.of(tokenizer, 3) is None
    assert shown(tokenizer, 1) == "a"


def test_bos_is_known_from_what_the_tokenizer_does(tokenizer):
    assert beginning_of_sequence(tokenizer) is None  # GPT-2 has a BOS token and adds none
    assert beginning_of_sequence(make_sentence_piece()) == 1
