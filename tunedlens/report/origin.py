"""How an evaluation was made, in words. `metrics.json` has the full record."""

import dataclasses
from collections.abc import Iterator

from tunedlens.config import EvaluateConfig
from tunedlens.evaluation import Evaluation
from tunedlens.files import JsonObject
from tunedlens.provenance import Provenance

_SIDES = {"validation": "held-out part", "train": "training part"}
_SWITCHES = {
    "bos": "BOS before every block",
    "by_position": "metrics by position",
    "chat": "conversations in the tokenizer's chat template",
    "transfer": "translators at other layers",
}
"""Settings that are on, where the name alone does not say what that means."""
_SAID = {
    *("model", "revision", "adapter", "gguf_file", "dtype", "device", "beside", "lenses"),
    *("corpus", "dataset", "seq_len", "split", "tokens"),
}
"""Settings that another line has."""


def origin(evaluation: Evaluation) -> dict[str, str]:
    """The model, lenses, text, settings and software of an evaluation, as far as they are known."""
    run: JsonObject = dict(evaluation.provenance)
    config, corpus, second = (run.get(part, {}) for part in ("config", "corpus", "beside"))
    sides = {config.get("split"): corpus} if "dataset" in corpus else corpus
    lines = {
        "model": _model(run.get("model"), config.get("model", {}) | run),
        "second model": _model(second.get("name"), second),
        "lenses": "; ".join(f"{name}: {_lens(one)}" for name, one in run.get("lenses", {}).items()),
        "text": "; ".join(_text(about, _SIDES.get(side, "")) for side, about in sides.items()),
        "scored": _scored(evaluation, config.get("corpus", {}).get("seq_len")),
        "settings that are not the defaults": ", ".join(_settings(config)),
        "device": _device(run),
        "software": software(evaluation.provenance),
        "created": minute(evaluation.provenance),
    }
    return {name: line for name, line in lines.items() if line}


def software(run: Provenance) -> str:
    """The versions of this package and of those that it computes with."""
    versions = run.get("versions", {})
    others = [f"{name} {version}" for name, version in versions.items() if name != "tunedlens"]
    return ", ".join([package(run), *others]) if versions else ""


def package(run: Provenance) -> str:
    """The version of this package, and the commit if it ran from a checkout."""
    version, commit = run["versions"].get("tunedlens", "of an unknown version"), run.get("commit")
    if not commit:
        return f"tunedlens {version}"
    name = commit.removesuffix("-dirty")
    changes = "" if name == commit else " with uncommitted changes"
    return f"tunedlens {version} (commit {name[:12]}{changes})"


def minute(run: Provenance) -> str:
    """When it was made, to the minute."""
    time = run.get("created", "")
    return time[:16].replace("T", " ") + " UTC" if time else ""


def first_digits(digest: str) -> str:
    """Enough of a hash to recognise it."""
    return f"{digest[:16]}…"


def _model(name: str | None, about: JsonObject) -> str:
    if name is None:
        return ""
    parts = [name]
    for field, words in (("revision", "revision"), ("adapter", "adapter"), ("gguf_file", "file")):
        if about.get(field):
            parts.append(f"{words} {about[field]}")
    if about.get("fingerprint"):
        digits = first_digits(about["fingerprint"])
        parts.append(f"SHA-256 of final norm and unembedding {digits}")
    return ", ".join(parts)


def _lens(made: JsonObject) -> str:
    """What a lens is: a saved one, a baseline, or one in memory."""
    if "sha256" in made:
        place = made.get("hub") or made.get("folder", "a file")
        return f"{place}, SHA-256 {first_digits(made['sha256'])}"
    if "text" in made:
        text, tokens = made["text"].get("dataset", "a text"), made.get("tokens_at_most", 0)
        return f"from up to {tokens:,} tokens of {text}"
    return "in memory"


def _text(about: JsonObject, side: str) -> str:
    """The size of a text, as far as it is known."""
    sizes = ("documents", "bytes", "tokens", "blocks")
    parts = [f"{about[size]:,} {size}" for size in sizes if size in about]
    if about.get("dropped_tokens"):
        parts.append(f"{about['dropped_tokens']:,} tokens left over")
    if "sampled" in about:
        parts.append("sampled from the model")
    if about.get("streamed"):
        parts.append("read as a stream")
    name = about.get("dataset", "a text")
    return f"{name} ({side}): {', '.join(parts)}" if side else f"{name}: {', '.join(parts)}"


def _scored(evaluation: Evaluation, block_tokens: int | None) -> str:
    blocks = f"{evaluation.blocks:,} block{'s' * (evaluation.blocks != 1)}"
    length = f" of {block_tokens:,} tokens" if block_tokens else ""
    digest = evaluation.tokens_sha256
    hashed = f", SHA-256 of their tokens {first_digits(digest)}" if digest else ""
    return f"{evaluation.tokens:,} positions in {blocks}{length}{hashed}"


def _settings(config: JsonObject) -> Iterator[str]:
    """Those that are not the defaults."""
    usual = dataclasses.asdict(EvaluateConfig())
    parts = [(config.get(part, {}), usual[part]) for part in ("model", "corpus")]
    for given, defaults in [*parts, (config, usual)]:
        for name, value in given.items():
            words = _SWITCHES.get(name, name.replace("_", " "))
            if name in _SAID or name not in defaults or not value or value == defaults[name]:
                continue
            yield words if value is True else f"{words} {value}"


def _device(run: JsonObject) -> str:
    parts = [str(run[key]) for key in ("device", "dtype") if key in run]
    for key in ("threads", "processes"):
        if run.get(key, 1) > 1:
            parts.append(f"{run[key]} {key}")
    return ", ".join(parts)
