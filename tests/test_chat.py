"""Conversations, rendered with the tokenizer's chat template."""

import copy
import json

import pytest
import torch
from conftest import make_gpt2

from tunedlens import CorpusConfig, EvaluateConfig, FrozenModel, InputError, builtin, evaluate
from tunedlens.cli import evaluate_command, train_command
from tunedlens.corpus import Packer, load_splits, resolve_corpus
from tunedlens.tokenizer import chat_text

CHAT_ML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATIONS = [
    [
        {"role": "user", "content": f"naïve question {i}?"},
        {"role": "assistant", "content": f"the fox {'jumps ' * (i % 5)}{i}"},
    ]
    for i in range(60)
]


def rendered(messages):
    """ChatML, by hand."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


@pytest.fixture
def chat_tokenizer(tokenizer):
    """The embedded tokenizer with the template and the special tokens of ChatML."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = CHAT_ML
    return changed


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [{"id": "a", "messages": messages} for messages in CONVERSATIONS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(tokenizer, dataset, **settings):
    config = CorpusConfig(dataset=str(dataset), seq_len=16, chat=True, **settings)
    return load_splits(resolve_corpus(config, "a model", None), tokenizer)


def documents(tokenizer, side):
    ids = torch.cat(list(side.blocks())).tolist()
    end, found = tokenizer.eos_token_id, [[]]
    for token in ids:
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    return found[:-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_are_text_with_special_tokens(chat_tokenizer, rows, streaming):
    splits = load(chat_tokenizer, rows, streaming=streaming)
    found = documents(chat_tokenizer, splits.train) + documents(chat_tokenizer, splits.validation)
    texts = {rendered(messages) for messages in CONVERSATIONS}
    assert len(found) > 50
    assert {chat_tokenizer.decode(ids) for ids in found} <= texts
    start, end = chat_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert all((ids.count(start), ids.count(end)) == (2, 2) for ids in found)


def test_another_column_and_parquet_give_the_same(chat_tokenizer, rows, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"talk": messages} for messages in CONVERSATIONS])
    pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
    other = load(chat_tokenizer, tmp_path / "chat.parquet", text_column="talk")
    expected = load(chat_tokenizer, rows)
    assert other.train.about["tokens_sha256"] == expected.train.about["tokens_sha256"]


@pytest.mark.filterwarnings("error")
def test_bytes_are_those_of_the_text_between_special_tokens(chat_tokenizer):
    packer = Packer(chat_tokenizer, 16, is_chat=True)
    for text in map(rendered, CONVERSATIONS):
        (ids,) = packer.encode([text])
        plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
        found = packer.count_bytes(torch.cat([ids[-1:], ids]))
        assert found == len(plain.encode())


def test_bos_and_eos_of_a_template_are_not_doubled(sentence_piece):
    text = "<s>the fox</s>the café</s>"
    (ids,) = Packer(sentence_piece, 8, has_bos=True, is_chat=True).encode([text])
    bos, eos = sentence_piece.bos_token_id, sentence_piece.eos_token_id
    assert (ids.tolist().count(bos), ids.tolist().count(eos)) == (0, 2)
    (ids,) = Packer(sentence_piece, 8, is_chat=True).encode([text])
    assert ids.tolist().count(bos) == 1
    assert ids[0] == bos


def test_bos_of_a_prompt_is_not_doubled(sentence_piece):
    model = FrozenModel(make_gpt2(), sentence_piece)
    expected = model.encode("the fox")
    found = model.encode("<s>the fox")
    assert found[0].tolist().count(model.bos_id) == 1
    assert found[0, 0] == expected[0, 0] == model.bos_id


def test_a_prompt_ends_where_the_reply_begins(chat_tokenizer):
    turn = {"role": "user", "content": "hi", "tool_calls": None}
    text = chat_text(chat_tokenizer, [turn], for_reply=True)
    assert text == rendered([turn]) + "<|im_start|>assistant\n"


def test_both_commands_read_conversations(chat_tokenizer, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_gpt2(vocab_size=len(chat_tokenizer)).save_pretrained("model")
    chat_tokenizer.save_pretrained("model")
    flags = "--model model --chat --seq-len 16 --fit closed-form --init-tokens 128 --batch-size 4"
    flags += " --evaluate-tokens 60 --device cpu --precision fp32 --kernel products --output run"
    assert train_command([*flags.split(), "--dataset", str(rows)]) == 0
    manifest = json.loads((tmp_path / "run" / "config.json").read_text())
    scored = evaluate(EvaluateConfig(lenses=("run",), tokens=60)).provenance
    assert manifest["config"]["corpus"]["chat"]
    assert scored["corpus"] == manifest["corpus"]["validation"]
    assert (
        evaluate_command(["--lens", "run", "--chat", "--prompt", "a question", "--output", "p"])
        == 0
    )
    assert "'<|im_start|>user\\na question<|im_end|>\\n<|im_start|>assistant\\n'" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dataset": builtin.NAME}, "--chat needs rows of conversations; --dataset embedded"),
        ({"dataset": "self"}, "--chat needs rows of conversations; --dataset self"),
        ({"text_column": "talk"}, "no column 'talk' of conversations.*it has id, messages"),
        ({"text_column": "id"}, "'id' of .* holds no conversations"),
    ],
)
def test_text_without_conversations_is_refused(chat_tokenizer, rows, settings, words):
    settings = {"dataset": rows, **settings}
    with pytest.raises(InputError, match=words):
        load(chat_tokenizer, settings.pop("dataset"), **settings)


def test_a_file_of_text_is_refused(chat_tokenizer, text_file):
    with pytest.raises(
        InputError, match=r"--chat needs rows of conversations; .*text.txt has none"
    ):
        load(chat_tokenizer, text_file)


def test_a_tokenizer_without_a_template_is_refused(tokenizer, rows):
    with pytest.raises(InputError, match="no chat template; leave out --chat"):
        load(tokenizer, rows)


def test_a_template_that_refuses_says_why(chat_tokenizer, rows):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="refuses a conversation: roles must alternate"):
        load(chat_tokenizer, rows)
