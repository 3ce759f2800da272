"""Files from strangers: whatever is in them, nothing runs, and what is wrong is one clear line."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_evaluation, make_gpt2, random_lens

from tunedlens import (
    CorpusConfig,
    FrozenModel,
    InputError,
    TrainConfig,
    TunedLens,
    escaping,
    load_lens,
    load_model,
    report,
)
from tunedlens.cli import evaluate_command, train_command
from tunedlens.cli.flags import make_parser, parse
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.files import write_json

NAME = "<script>alert(1)</script>|[x](javascript:y)`\x1b[2J"


def load(tokenizer, dataset, **settings):
    config = CorpusConfig(dataset=str(dataset), seq_len=4, **settings)
    return load_splits(resolve_corpus(config, "a model", None), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_file_whose_name_is_a_pattern_is_read_itself(tokenizer, tmp_path, streaming):
    for name, word in (("data[1].jsonl", "right"), ("data1.jsonl", "wrong")):
        rows = [json.dumps({"text": f"{word} {i} " * 9}) for i in range(40)]
        (tmp_path / name).write_text("\n".join(rows))
    splits = load(tokenizer, tmp_path / "data[1].jsonl", streaming=streaming)
    text = tokenizer.decode(torch.cat(list(splits.train.blocks())))
    assert "right" in text
    assert "wrong" not in text


DEEP = b'{"text": "x", "a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", DEEP, "line 1, is nested more than 64 deep"),
        ("a.json", DEEP.replace(b"[", b"[\n"), "line 64, is nested more than 64 deep"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            r"\(line 2, byte 13 is 0xe9",
        ),
        ("a.csv", b"text\ncaf\xe9\n", r"not UTF-8 \(line 2, byte 3 is 0xe9"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.jsonl", b'null\n{"text": "a"}\n', "holds no rows"),
        ("a.json", b'[null, {"text": "a"}]', "holds no rows"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "cannot read the dataset"),
    ],
    ids=range(10),
)
def test_damaged_rows_are_one_clear_error(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tokenizer, tmp_path / name)


def test_brackets_within_strings_are_not_nested(tokenizer, tmp_path):
    text = '["\\' * 300
    rows = [json.dumps({"text": f"{text} {i}"}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert load(tokenizer, tmp_path / "a.jsonl").train.about["documents"] == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_that_is_not_utf8_is_one_clear_error(tokenizer, tmp_path, streaming):
    import pyarrow
    import pyarrow.parquet

    offsets, data = (pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"caf\xe9"))
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, data])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"UTF8|utf-8"):
        list(load(tokenizer, tmp_path / "a.parquet", streaming=streaming).train.blocks())


def test_empty_name_of_a_dataset_is_refused(tokenizer):
    with pytest.raises(InputError, match="--dataset is empty"):
        load(tokenizer, "")


def remote_model(folder, tokenizer):
    """A model whose repository brings code that leaves a mark when it runs."""
    make_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "strange"
    config["auto_map"] = {
        "AutoConfig": "strange.StrangeConfig",
        "AutoModelForCausalLM": "strange.StrangeModel",
    }
    write_json(folder / "config.json", config)
    (folder / "strange.py").write_text(
        "from pathlib import Path\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "class StrangeConfig(GPT2Config):\n    model_type = 'strange'\n"
        "class StrangeModel(GPT2LMHeadModel):\n    config_class = StrangeConfig\n"
    )
    return folder


def test_code_of_a_model_runs_only_if_it_is_trusted(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = remote_model(tmp_path / "strange", tokenizer)
    with pytest.raises(InputError, match=r"code of its own; .* --trust-remote-code"):
        load_model(folder, device="cpu")
    assert not (folder / "ran").exists()
    assert load_model(folder, device="cpu", trust_remote_code=True).identity.n_layers == 3
    assert (folder / "ran").exists()


def test_config_in_a_file_cannot_allow_code_to_run():
    config = {"model": {"model": "x", "trust_remote_code": True}, "corpus": {}}
    assert TrainConfig.from_json(config, "it").model.trust_remote_code is False


def test_model_with_weights_that_are_no_number_is_told_so(tokenizer):
    gpt2 = make_gpt2()
    with torch.no_grad():
        gpt2.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"states of layer 2 are not finite.*weights are damaged"):
        FrozenModel(gpt2, tokenizer, name="x")


@pytest.fixture
def saved(tiny, tmp_path):
    random_lens(tiny).save(tmp_path / "lens")
    return tmp_path / "lens"


def rewrite(folder, change=lambda _: None, **entries):
    """Change the tensors of a lens and its manifest, under a right checksum."""
    import hashlib

    path = folder / "lens.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", manifest | {"lens_sha256": sha256} | entries)


BIAS = "resid_pre.0.bias"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(BIAS),
        lambda tensors: tensors.update({"0.weight": torch.zeros(16, 16)}),
        lambda tensors: tensors.update({BIAS: torch.zeros(17)}),
        lambda tensors: tensors.update({BIAS: torch.tensor(0.0)}),
        lambda tensors: tensors.update({BIAS: tensors[BIAS].int()}),
        lambda tensors: tensors.update({BIAS: tensors[BIAS].bool()}),
        lambda tensors: tensors.update({BIAS: tensors[BIAS].half()}),
        lambda tensors: tensors.update({BIAS: tensors[BIAS].to(torch.complex64)}),
        lambda tensors: tensors.update({BIAS: tensors[BIAS].to(torch.float8_e4m3fn)}),
        lambda tensors: tensors.update({BIAS: torch.full((16,), 1e300, dtype=torch.float64)}),
        lambda tensors: tensors.update({BIAS: torch.full((16,), torch.inf)}),
    ],
    ids=range(11),
)
def test_tensors_that_are_not_the_lens_of_the_model_are_refused(tiny, saved, change):
    rewrite(saved, change)
    with pytest.raises(InputError, match=r"lens\.safetensors"):
        load_lens(saved, tiny)


@pytest.mark.parametrize(
    "entries",
    [
        {"lens": []},
        {"lens": {}},
        {"format": True},
        {"model": []},
        {"model": {"name": 3}},
        {"config": []},
        {"config": "x"},
        {"config": {"corpus": 3, "model": {}}},
        {"config": {"lr": "x", "corpus": {}, "model": {}}},
        {"config": {"seed": 1.5, "corpus": {}, "model": {}}},
        {"created": 3},
        {"sites": "resid_pre"},
        {"sites": [3]},
        {"sites": ["x"]},
        {"lens_sha256": None},
        {"probe": 3},
        {"probe": {}},
        {"probe": {"ids": [10**30], "top_ids": [[0]], "top_log_probs": [[0]]}},
        {"probe": {"ids": [0], "top_ids": [0], "top_log_probs": [0]}},
        {"probe": {"ids": [0] * 99, "top_ids": [[0.5]], "top_log_probs": [["x"]]}},
        {"progress": {"tokens": "x"}},
        {"held_out": {"results": [{"lens": 3}]}},
    ],
    ids=range(22),
)
def test_manifest_of_another_form_is_refused(tiny, saved, entries):
    rewrite(saved, **entries)
    with pytest.raises(InputError):
        load_lens(saved, tiny)


@pytest.mark.parametrize("name", ["config.json", "lens.safetensors"])
def test_fifo_in_place_of_a_file_is_refused(tiny, saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(InputError, match="not a regular file"):
        load_lens(saved, tiny)


def test_path_that_the_system_refuses_is_refused(tiny):
    for path in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError):
            load_lens(path, tiny)
    with pytest.raises(InputError):
        TunedLens.load("x/" * 3000, tiny)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("streming: false", "streming is not a setting; did you mean streaming"),
        ("streming: null", "streming is not a setting"),
        ("help: true", "help is not a setting"),
        ("config: other.yaml", "config is not a setting"),
        ("trust_remote_code: true", "can only be given on the command line"),
        ("tokens: {a: 1}", "tokens must be text, a number"),
        ("model: no", "model must be text"),
        ("tokens: [1, [2]]", "tokens must be text, a number"),
        ("a: &a [*a]", "alias"),
        ("- 1", "expected lines like"),
    ],
    ids=range(10),
)
def test_yaml_with_anything_but_settings_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        parse(make_parser("tunedlens train", "", TrainConfig), ["--config", str(path)])


def test_yaml_that_is_a_fifo_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "run.yaml")
    assert train_command(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "not a regular file" in capsys.readouterr().err


def changed(path, value, data=None):
    """Results with another value at a path of keys."""
    data = make_evaluation().to_json() if data is None else data
    data = json.loads(json.dumps(data))
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["results", 0, "value"], "x"),
        (["results", 0, "value"], None),
        (["results", 0, "standard_error"], -1.0),
        (["results", 0, "lens"], "../x"),
        (["results", 0, "metric"], "unknown"),
        (["results"], []),
        (["results"], {}),
        (["n_layers"], 10**15),
        (["n_layers"], "8"),
        (["n_layers"], 0),
        (["tokens"], -1),
        (["blocks"], 1.5),
        (["constant"], "logit"),
        (["sites"], {"logit": "nowhere"}),
        (["sites"], {"other": "mlp_out"}),
        (["differences", 0, "layer"], 0.5),
        (["differences"], [["tuned", "logit", None, "kl_nats", 1.0, 0.1]]),
        (["by_position", "logit", "kl_nats", "values"], [[1.0]]),
        (["transfer", "tuned", "kl_nats", "standard_errors"], []),
        (["transfer", "other"], {}),
        (["provenance"], []),
        (["provenance"], {"model": 3}),
        (["provenance"], {"config": {"corpus": "x"}}),
        (["provenance"], {"config": {"split": []}}),
        (["provenance"], {"config": {"model": "x"}}),
        (["provenance"], {"lenses": {"tuned": {"sha256": 3}}}),
        (["provenance"], {"corpus": {"dataset": "x", "bytes": "many"}}),
        (["provenance"], {"corpus": {"train": "x"}}),
        (["surprise"], 1),
    ],
    ids=range(29),
)
def test_metrics_of_another_form_are_refused(tmp_path, capsys, path, value):
    write_json(tmp_path / "metrics.json", changed(path, value))
    assert evaluate_command(["--redraw", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/metrics.json: the evaluation is damaged: ")
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("content", ['{"schema": 2, "results": NaN}', '{"schema": "\\ud800"}'])
def test_metrics_with_nan_or_half_a_character_are_refused(tmp_path, capsys, content):
    (tmp_path / "metrics.json").write_text(content)
    assert evaluate_command(["--redraw", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "provenance",
    [
        {"lenses": {"a": {"sha256": "x"}, "b": {"text": {}}, "c": {}}, "versions": {}},
        {"corpus": {"train": {}, "other": {"blocks": 3}}, "versions": {"torch": "2"}},
    ],
)
def test_origin_is_told_as_far_as_it_is_known(tmp_path, provenance):
    write_json(tmp_path / "metrics.json", changed(["provenance"], provenance))
    assert evaluate_command(["--redraw", str(tmp_path)]) == 0
    assert "How this report was made" in (tmp_path / "report.md").read_text()


def test_names_from_strangers_are_shown_as_they_are():
    evaluation = make_evaluation(grids=False)
    evaluation.provenance.update(model=NAME, command=f"x\n```\n{NAME}")
    text = report.files._markdown_report(evaluation)
    heading = text.splitlines()[0]
    assert heading == (
        "# Lenses on \\<script\\>alert(1)\\</script\\>\\|\\[x\\](javascript:y)\\`⟨1b⟩\\[2J"
    )
    assert "\x1b" not in text
    assert "````sh\nx\n```\n" in text


def test_cells_start_no_formula():
    text = report.files._csv(("lens", "layer"), [("=1+1", 0, "kl_nats", -0.5, None)])
    row = list(csv.reader(io.StringIO(text)))[1]
    assert row == ["'=1+1", "0", "kl_nats", "-0.5", ""]


def test_terminal_text_moves_nothing():
    assert (
        escaping.for_terminal("a\x1b[2J\u202eb\n\tü 日本 🎉") == "a⟨1b⟩[2J⟨e2 80 ae⟩b\n\tü 日本 🎉"
    )
    assert escaping.printable("\ud800") == "⟨ed a0 80⟩"


def test_error_of_a_command_is_one_line_without_control_characters(tmp_path, capsys):
    assert evaluate_command(["--redraw", str(tmp_path / "a\n\x1b[2J")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
    shutil.rmtree(tmp_path)


def pickled(operations):
    """A file of `torch.save` with another pickle in it."""
    buffer, out = io.BytesIO(), io.BytesIO()
    torch.save({"a": 1}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(out, "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, operations if name.endswith(".pkl") else whole.read(name))
    return out.getvalue()


def test_tuples_that_take_exponential_time_are_refused(tiny, tmp_path):
    operations = b"\x80\x02}(K\x01K\x01\x86q\x00"  # {(1, 1): ...
    for level in range(59):  # ... then a tuple of the last one twice, as key or value
        operations += b"h%ch%c\x86q%c" % (level, level, level + 1)
    (tmp_path / "a.pt").write_bytes(pickled(operations + b"u."))
    with pytest.raises(InputError, match="cannot be read"):
        load_lens(tmp_path / "a.pt", tiny)


def test_compressed_parts_of_a_pt_file_are_refused(tiny, tmp_path):
    buffer = io.BytesIO()
    torch.save({"J": {0: torch.zeros(1000, 1000)}}, buffer)
    with (
        zipfile.ZipFile(buffer) as whole,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    with pytest.raises(InputError, match="cannot be read"):
        load_lens(tmp_path / "a.pt", tiny)


def test_fifo_in_place_of_a_pt_file_is_refused(tiny, tmp_path):
    os.mkfifo(tmp_path / "params.pt")
    with pytest.raises(InputError):
        load_lens(tmp_path / "params.pt", tiny)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_jacobians_of_other_dtypes_are_refused(tiny, tmp_path, dtype):
    torch.save({"J": {i: torch.zeros(16, 16, dtype=dtype) for i in range(2)}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"J\[0\] .* must be a floating-point tensor"):
        load_lens(tmp_path / "a.pt", tiny)


def test_jacobian_that_float32_cannot_hold_is_refused(tiny, tmp_path):
    large = torch.full((16, 16), 1e300, dtype=torch.float64)
    torch.save({"J": {0: large, 1: large}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="not finite in float32"):
        load_lens(tmp_path / "a.pt", tiny)


def test_folder_with_a_fifo_for_results_is_not_overwritten(tmp_path):
    os.mkfifo(tmp_path / "metrics.json")
    with pytest.raises(InputError, match="do not belong to an evaluation"):
        report.require_own(tmp_path)


def test_killed_report_can_be_written_again(tmp_path):
    (tmp_path / ".host-1.metrics.csv").touch()
    report.require_own(tmp_path)


@pytest.mark.slow
def test_fuzzer_finds_nothing():
    script = Path(__file__).parents[1] / "scripts" / "fuzz.py"
    subprocess.run([sys.executable, script, "--inputs", "300", "--seed", "2"], check=True)
