"""Gives damaged files to every reader and counts what goes wrong.

A reader may accept a file or refuse it with an `InputError`. Everything else is a failure: another
exception, a crash, more than ten seconds, more memory than allowed, or a file that is accepted
although its checksum is wrong or a value of a lens is not finite.

    python scripts/fuzz.py --inputs 6000
"""

# ruff: noqa: E402 - datasets reads the environment when it is imported

import argparse
import base64
import collections
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FOLDER = tempfile.mkdtemp(prefix="fuzz-")
os.environ["HF_DATASETS_CACHE"] = f"{FOLDER}/cache"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["DATASETS_VERBOSITY"] = "critical"

import datasets  # noqa: F401 - before the limits of a reader apply
import pyarrow
import pyarrow.parquet
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import tunedlens
from tunedlens import (
    CausalBasis,
    CorpusConfig,
    FrozenModel,
    InputError,
    TrainConfig,
    Trajectory,
    anomaly,
    builtin,
    checkpoint,
    report,
)
from tunedlens.cli.flags import make_parser, parse
from tunedlens.config.settings import configured
from tunedlens.corpus import load_splits, resolve_corpus
from tunedlens.evaluation import MODEL, Difference, Evaluation, Grid, Result
from tunedlens.files import write_json

SECONDS = 10
"""The limit of processor time for a file; the limit of elapsed time is six times as long."""
MEMORY_BYTES = 2 * 2**30
"""The limit of additional address space for all readers, beyond that of the imports."""


class OverTimeError(BaseException):
    """Not an Exception, so that no reader treats it as damage."""


class Target(NamedTuple):
    """One kind of file."""

    share: int
    """The share of all inputs, in per cent."""
    file: str
    """The name of the file that is changed, in a folder that is otherwise undamaged."""
    read: Callable[[Path], object]
    """Reads the folder; returns the tensors that must be finite, or nothing."""
    has_checksum: bool = False
    cases: tuple[bytes, ...] = ()
    """Files to try besides the mutations."""


def deep(count: int) -> bytes:
    return b"[" * count + b"]" * count


JSON_CASES = (
    *(b"", b"{", b"[]", b"null", b"NaN", b'"\\ud800"', b"\xff\xfe", deep(10_000), b"1" * 5000),
    *(b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[1e999]", b'{"lens": []}', b'{"schema": 2}'),
)
YAML_CASES = (
    b"a0: &a [x, x]\n" + b"".join(b"a%d: &a%d [*a, *a]\n" % (i, i) for i in range(1, 30)),
    *(b"streming: false", b"help: true", b"config: x", b"&a [*a]", deep(5000), b"a: 2001-99-99"),
    *(b"!!python/object/apply:os.system [id]", b"a: !!bool x", b"tokens: .nan", b"\x00", b"- a"),
    *(b"? [a]\n: b", b"model: no", b"a: " + b"1:" * 20_000 + b"1", b"a: x\n" * 20_000),
)
ROW_CASES = (
    *(b"", b"\n\n", b'{"text": "caf\xe9"}\n', b'{"text": "\\ud800"}\n', b"[]", b"{}", b"null"),
    *(b'{"text": "x", "a": ' + deep(n) + b"}\n" for n in (70, 500, 1000, 10_000)),
    *(b"null\nnull\n", b"[null]", b'[null, {"text": "a"}]', b"[[null]]", b"1", b"\n\nnull"),
    *(b'{"text": "a"}\nnull\n', b'null\n{"text": "a"}', b"\xef\xbb\xbfnull"),
    *(deep(10_000).replace(b"[", b"[\n"), b'{"text": 1}\n{"text": "a"}\n', b"\x1f\x8b\x08" * 9),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(
        ["=1+1", "<script>", "../x", "$\\frac", "\x1b[2J", "x" * 5000, 10**400, 1e308]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
EDIT = st.tuples(
    st.sampled_from(
        ["flip", "set", "insert", "delete", "truncate", "repeat", "json", "json", "json"]
    ),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=8),
    VALUES,
)


def mutated(content: bytes, edits: list[tuple[str, float, bytes, object]]) -> bytes:
    """A file with some edits. JSON, also in the header of a safetensors file, stays valid JSON."""
    for kind, where, data, value in edits:
        at = int(where * len(content))
        if kind == "json":
            content = with_json_edited(content, where, value)
        elif kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << data[0] % 8)]) + content[at + 1 :]
        elif kind == "set":
            content = content[:at] + data + content[at + len(data) :]
        elif kind == "insert":
            content = content[:at] + data + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(data) :]
        elif kind == "truncate":
            content = content[:at]
        elif kind == "repeat":
            content = content[:at] + content[at : at + 64] * 4 + content[at:]
    return content


def with_json_edited(content: bytes, where: float, value: object) -> bytes:
    try:
        data = json.loads(content)
        replace_node(data, where, value)
        return json.dumps(data).encode()
    except (ValueError, RecursionError, TypeError):
        pass
    try:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        replace_node(header, where, value)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]
    except (ValueError, RecursionError, TypeError, struct.error, MemoryError, OverflowError):
        return content


def replace_node(data: object, where: float, value: object) -> None:
    """Replace, remove or add one value somewhere in a tree."""
    nodes = [data]
    for node in nodes:
        inner = node.values() if isinstance(node, dict) else node
        nodes += [one for one in inner if isinstance(one, dict | list) and one]
    node = nodes[int(where * len(nodes))]
    keys = list(node) if isinstance(node, dict) else range(len(node))
    if not keys:
        return
    key = keys[int(where * 7919 * len(keys)) % len(keys)]
    if int(where * 104729) % 5 == 0:
        del node[key]
    else:
        node[key] = value


def tiny_model() -> FrozenModel:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(builtin.FOLDER)
    config = GPT2Config(vocab_size=4096, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 0
    return FrozenModel(GPT2LMHeadModel(config).eval(), tokenizer, name="tiny")


def results() -> Evaluation:
    """A small evaluation, as `metrics.json` holds it."""
    values, differences = [], []
    for lens in ("logit", "tuned"):
        for layer in range(2):
            values += [Result(lens, layer, m, 1.5, 0.1) for m in ("kl_nats", "perplexity")]
        values += [Result(lens, None, m, 1.5, None) for m in ("kl_nats", "mean_prediction_depth")]
    for layer in (0, 1, None):
        differences.append(Difference("tuned", "logit", layer, "kl_nats", -0.5, 0.1))
    values += [Result(MODEL, 2, m, 1.0, 0.1) for m in ("perplexity", "bits_per_byte")]
    grid = Grid([[1.0, 2.0], [None, 2.0]], [[None, 0.1], [0.1, 0.1]])
    provenance = {"model": "m", "command": "c", "config": {"corpus": {"dataset": "d"}}}
    return Evaluation(
        values,
        **{"n_layers": 2, "tokens": 9, "text_bytes": 9, "blocks": 1, "differences": differences},
        transfer={"tuned": {"kl_nats": grid}},
        provenance=provenance,
    )


def make_folder(model: FrozenModel, folder: Path) -> None:
    """Write one undamaged file of every kind."""
    lens = tunedlens.TunedLens.from_model(model)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.normal_(0, 0.1)
    probe = tunedlens.model.take_probe(model)
    progress = {"tokens": 5, "init_tokens": 3, "seconds": 1.0}
    held_out = results().to_json()
    lens.save(folder, {"probe": probe, "progress": progress, "held_out": held_out})
    checkpoint.save_state(
        folder, checkpoint.State({"a": torch.randn(9)}, {"config": {"model": {}, "corpus": {}}})
    )
    reads = tunedlens.trajectory(model, None, ["A short text.", "x = 1", "y = 2"])
    reads[0].save(folder / "read.safetensors")
    anomaly.fit(reads).save(folder / "detector.json")
    ids = model.encode("A short text for a basis.")
    tunedlens.causal_basis(model, lens, ids, layer=1, k=2).save(folder / "basis.safetensors")
    write_json(folder / "metrics.json", held_out)
    (folder / "run.yaml").write_text("model: x\ntokens: 1e6\nstreaming: true\nlr: 0.1\n")
    checkpoint.export_lens(lens, folder / "foreign")
    jacobian = tunedlens.JacobianLens.from_jacobians(model, torch.randn(2, 8, 8))
    checkpoint.export_lens(jacobian, folder / "j.pt")
    rows = [{"id": i, "text": f"naïve café {i} " * 9} for i in range(9)]
    (folder / "a.txt").write_text("naïve café " * 99)
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.csv").write_text(
        "id,text\n" + "\n".join(f"{i},{r['text']}" for i, r in enumerate(rows))
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")


def targets(model: FrozenModel) -> dict[str, Target]:
    def lens_in(folder: Path) -> object:
        checkpoint.describe_lens(folder)
        return dict(checkpoint.load_lens(folder, model, check=True).translators.state_dict())

    def metrics_in(folder: Path) -> None:
        evaluation = report.read_evaluation(folder)
        report.terminal_table(evaluation)
        report.files._markdown_report(evaluation)
        report.files.page(evaluation, {}, {})

    def yaml_in(folder: Path) -> None:
        flags = parse(make_parser("x", "", TrainConfig), ["--config", str(folder / "run.yaml")])
        configured(TrainConfig(), flags)

    def state_in(folder: Path) -> object:
        tensors, metadata = checkpoint.load_state(folder)
        TrainConfig.from_json(metadata["config"], "it")
        return tensors

    def trajectory_in(folder: Path) -> None:
        read = Trajectory.load(folder / "read.safetensors")
        report.top_k(read).to_markdown()
        str(read)

    def detector_in(folder: Path) -> None:
        anomaly.Detector.load(folder / "detector.json").scores([read])

    def basis_in(folder: Path) -> object:
        basis = CausalBasis.load(folder / "basis.safetensors")
        repr(basis)
        return {"vectors": basis.directions().rows()}

    read = tunedlens.trajectory(model, None, "z = 3")

    def corpus_in(name: str) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            for streaming in (False, True):
                config = CorpusConfig(dataset=str(folder / name), seq_len=8, streaming=streaming)
                splits = load_splits(resolve_corpus(config, "m", None), model.tokenizer)
                list(splits.validation.blocks())
                if not name.endswith(("jsonl", "parquet")):
                    return

        return read

    return {
        "lens: weights": Target(15, "lens.safetensors", lens_in, True),
        "lens: manifest": Target(14, "config.json", lens_in, cases=JSON_CASES),
        "metrics.json": Target(12, "metrics.json", metrics_in, cases=JSON_CASES),
        "state of a run": Target(8, "state/1.safetensors", state_in, True),
        "trajectory": Target(10, "read.safetensors", trajectory_in),
        "causal basis": Target(4, "basis.safetensors", basis_in),
        "anomaly detector": Target(3, "detector.json", detector_in, cases=JSON_CASES),
        "YAML": Target(10, "run.yaml", yaml_in, cases=YAML_CASES),
        "tuned-lens: params.pt": Target(5, "foreign/params.pt", lambda f: lens_in(f / "foreign")),
        "tuned-lens: config": Target(
            3, "foreign/config.json", lambda f: lens_in(f / "foreign"), cases=JSON_CASES
        ),
        "Jacobian: .pt": Target(6, "j.pt", lambda f: lens_in(f / "j.pt")),
        "corpus: txt": Target(2, "a.txt", corpus_in("a.txt")),
        "corpus: jsonl": Target(3, "a.jsonl", corpus_in("a.jsonl"), cases=ROW_CASES),
        "corpus: json": Target(2, "a.json", corpus_in("a.json"), cases=ROW_CASES),
        "corpus: csv": Target(1, "a.csv", corpus_in("a.csv"), cases=ROW_CASES),
        "corpus: parquet": Target(2, "a.parquet", corpus_in("a.parquet")),
    }


def over_time(*_: object) -> None:
    raise OverTimeError


def outcome(target: Target, folder: Path, content: bytes | None, whole: bytes) -> str:
    """Call a reader with one file, or with a FIFO if the content is None; returns the outcome."""
    path = folder / target.file
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        tensors = target.read(folder)
    except InputError:
        return "refused"
    except OverTimeError:
        return "too slow"
    except MemoryError:
        return "too much memory"
    except BaseException:
        traceback.print_exc()
        return "traceback"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    if content != whole and target.has_checksum:
        return "wrongly accepted"
    if isinstance(tensors, dict) and not all(one.isfinite().all() for one in tensors.values()):
        return "wrongly accepted"
    return "accepted"


def run(target: Target, folder: Path, count: int, start: int, found: Path) -> None:
    """Try one kind of file. The counts are saved in a file, so that a crash does not lose them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, over_time)
    signal.signal(signal.SIGPROF, over_time)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    whole = (folder / target.file).read_bytes()
    counts: collections.Counter[str] = collections.Counter()

    def attempt(content: bytes | None) -> None:
        if content is not None:
            (folder / "last").write_bytes(content)
        counts["crash"] += 1
        found.write_text(json.dumps(counts))
        result = outcome(target, folder, content, whole)
        counts["crash"] -= 1
        counts[result] += 1
        found.write_text(json.dumps(counts))
        if result not in ("accepted", "refused"):
            shown = base64.b64encode((content or b"")[:300]).decode()
            print(f"{target.file}: {result}: {shown}", file=sys.stderr, flush=True)

    @seed(start)
    @settings(
        max_examples=max(1, count - len(target.cases) - 2),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(EDIT, min_size=1, max_size=3))
    def attempt_mutated(edits: list[tuple[str, float, bytes, object]]) -> None:
        attempt(mutated(whole, edits))

    for content in (whole, None, *target.cases):
        attempt(content)
    attempt_mutated()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the targets whose names contain this")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_model()
    kinds = ("accepted", "refused", "traceback", "crash", "too slow", "too much memory")
    kinds += ("wrongly accepted",)
    total: collections.Counter[str] = collections.Counter()
    print(f"{'':22}" + "".join(f"{kind:>18}" for kind in kinds))
    for name, target in targets(model).items():
        if flags.only and flags.only not in name:
            continue
        folder, found = Path(FOLDER, "x"), Path(FOLDER, "counts")
        make_folder(model, folder)
        if (child := os.fork()) == 0:
            run(target, folder, flags.inputs * target.share // 100, flags.seed, found)
            os._exit(0)
        os.waitpid(child, 0)
        counts = collections.Counter(json.loads(found.read_text()))
        total += counts
        print(f"{name:22}" + "".join(f"{counts[kind]:18,}" for kind in kinds), flush=True)
        shutil.rmtree(folder)
    print(f"{'all':22}" + "".join(f"{total[kind]:18,}" for kind in kinds))
    print(f"{sum(total.values()):,} inputs")
    shutil.rmtree(FOLDER)
    return 0 if sum(total[kind] for kind in kinds[2:]) == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
