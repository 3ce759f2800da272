"""Results as tables, JSON, CSV and Markdown."""

import csv
import io
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tunedlens.checkpoint import now, write, write_json
from tunedlens.evaluation import MODEL, Evaluation
from tunedlens.frozen import FrozenModel
from tunedlens.metrics import Estimate

METRICS_JSON = "metrics.json"
METRICS_CSV = "metrics.csv"

_VERSIONED = ("tunedlens", "torch", "transformers", "tokenizers", "accelerate")


def provenance(model: FrozenModel) -> dict[str, Any]:
    """Where figures come from: versions, commit, device, dtype, model, time, command."""
    identity = model.identity
    return {
        "created": now(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": identity.name,
        "revision": identity.revision,
        "fingerprint": identity.fingerprint,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _VERSIONED},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one; `-dirty` if changed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `metrics.json` (everything) and `metrics.csv` (one row per figure).

    Raises:
        InputError: the folder cannot be written.
    """
    write_json(folder / METRICS_JSON, evaluation.to_json())
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["lens", "layer", "metric", "value", "standard_error"])
    for result in evaluation.results:
        rows.writerow(
            [result.lens, result.layer, result.metric, result.value, result.standard_error]
        )
    write(folder / METRICS_CSV, text.getvalue())


def kl_table(evaluation: Evaluation) -> str:
    """Layer, and the KL of every lens, as plain text."""
    return _aligned(_kl_rows(evaluation))


def full_table(evaluation: Evaluation) -> str:
    """Every lens and layer with KL, cross-entropy, perplexity, bits per byte, agreement."""
    rows = [["layer", "lens", "KL (nats)", "CE (nats)", "perplexity", "bits/byte", "top-1"]]
    metrics = ("kl_nats", "cross_entropy_nats", "perplexity", "bits_per_byte", "top1_agreement")
    columns = {
        (lens, metric): evaluation.by_layer(lens, metric)
        for lens in evaluation.lenses
        for metric in metrics
    }
    for layer in range(evaluation.n_layers):
        for lens in evaluation.lenses:
            figures = [plus_minus(columns[lens, metric][layer]) for metric in metrics]
            rows.append([str(layer), lens, *figures])
    own = [plus_minus(evaluation.of_model(metric)) for metric in metrics[1:4]]
    rows.append([str(evaluation.n_layers), MODEL, "0", *own, "1"])
    return _aligned(rows)


def card(name: str, about: dict[str, Any], evaluation: Evaluation) -> str:
    """A short README for a saved lens: what made it, and its own KL table."""
    config, corpus = about["config"], about["corpus"]["train"]
    text = f"{corpus['dataset']}"
    if "tokens_sha256" in corpus:
        text += f" ({corpus['bytes']:,} bytes; tokens' SHA-256 {corpus['tokens_sha256'][:16]}…)"
    model, versions = about["provenance"]["model"], about["provenance"]["versions"]
    header, *rows = _kl_rows(evaluation)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---:"] * len(header), *rows)]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A tuned lens for `{model}`, made by tunedlens {versions['tunedlens']}.",
            "",
            f"- Text: {text}, blocks of {config['corpus']['seq_len']} tokens.",
            f"- Fit: {config['fit']}, with {about['progress']['start_tokens']:,} tokens for the "
            f"closed form and {about['progress']['tokens']:,} for the steps, in "
            f"{about['progress']['seconds']:.0f} s on {about['provenance']['device']} "
            f"({config['precision']}), seed {config['seed']}.",
            "- Everything else is in `config.json`; load it with `TunedLens.load`.",
            "",
            f"KL(model ‖ lens) in nats on {evaluation.tokens:,} held-out tokens, ± one standard "
            "error:",
            "",
            *lines,
            "",
        ]
    )


def plus_minus(estimate: Estimate) -> str:
    """A figure with its standard error, to the digits that the error leaves."""
    value, error = estimate
    if error is None or value > 1e5:
        return f"{value:.4g}"
    digits = 4 if value < 10 else 2 if value < 1000 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _kl_rows(evaluation: Evaluation) -> list[list[str]]:
    columns = [evaluation.by_layer(lens, "kl_nats") for lens in evaluation.lenses]
    rows = [
        [str(layer), *(plus_minus(column[layer]) for column in columns)]
        for layer in range(evaluation.n_layers)
    ]
    means = [sum(e.value for e in column) / len(column) for column in columns]
    header = ["layer", *(f"{lens} KL (nats)" for lens in evaluation.lenses)]
    return [header, *rows, ["mean", *(f"{mean:.4f}" for mean in means)]]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
