import pytest

from tunedlens.tokenizer import shown


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
