"""The README of a saved lens, with the front matter that the Hugging Face hub reads."""

import re
from contextlib import suppress

import yaml

from tunedlens import checkpoint
from tunedlens.config import ONE_PASS
from tunedlens.corpus.sources import is_on_hub
from tunedlens.errors import InputError
from tunedlens.escaping import code, for_markdown
from tunedlens.evaluation import Evaluation
from tunedlens.files import JsonObject, parse_yaml
from tunedlens.report.tables import kl_rows, markdown, scored_text, summary

_FRONT_MATTER = re.compile(r"---\n(.*?)^---\n+", re.DOTALL | re.MULTILINE)
_BEGIN = "<!-- What is between these two comments is replaced by `tunedlens card`. -->"
_END = "<!-- The end of what `tunedlens card` replaces. -->"


def card(name: str, manifest: JsonObject, evaluation: Evaluation | None = None) -> str:
    """The README of a saved lens: how it was made, and its KL table.

    Args:
        name: the title.
        manifest: the content of `config.json`.
        evaluation: held-out results of the training.
    """
    parts = [about(manifest)]
    if evaluation is not None:
        parts += [
            f"KL(model ‖ lens) in nats on {evaluation.tokens:,} held-out tokens, ± one standard "
            "error:",
            markdown(kl_rows(evaluation)),
        ]
    return with_front_matter(
        with_generated(f"# {for_markdown(name)}", "\n\n".join(parts)), manifest
    )


def about(manifest: JsonObject) -> str:
    """The description of a lens and of how it was made.

    Args:
        manifest: as `describe_lens` returns it.
    """
    is_ours = "format" in manifest
    maker = "made by tunedlens" if is_ours else "in the format of another library"
    model = manifest["model"].get("name")
    made_for = "an unknown model" if model is None else code(model)
    is_recorded = {"config", "corpus", "progress", "provenance"} <= manifest.keys()
    lines = [
        *(_training(manifest) if is_recorded else ["- Training text and tokens: not known."]),
        f"- {'All settings are in `config.json`. Load' if is_ours else 'Load'} the lens with "
        "`tunedlens.load_lens`.",
    ]
    return f"A {manifest['lens']} lens for {made_for}, {maker}.\n\n" + "\n".join(lines)


def with_generated(text: str, generated: str) -> str:
    """Replace the generated part of a card, or add it at the end if there is none."""
    part = f"{_BEGIN}\n\n{generated}\n\n{_END}"
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return before + part + after
    return f"{text.rstrip()}\n\n{part}\n"


def _training(manifest: JsonObject) -> list[str]:
    """The text and the fit of a lens that was made by `train`."""
    config, corpus, run = manifest["config"], manifest["corpus"]["train"], manifest["provenance"]
    text = corpus["dataset"]
    if "sampled" in corpus:
        text += ", sampled from the model"
    if "tokens_sha256" in corpus:
        text += f" ({corpus['bytes']:,} bytes; tokens' SHA-256 {corpus['tokens_sha256'][:16]}…)"
    first_pass, steps = checkpoint.trained_tokens(manifest)
    used = f"{first_pass:,} tokens"
    if config["fit"] not in ONE_PASS:
        used += f" for the closed form and {steps:,} for the steps"
    shape = []
    if config.get("layers") is not None:
        shape.append(f"- Layers: {config['layers'].replace(',', ', ')}.")
    if config.get("low_rank") is not None:
        shape.append(f"- Rank of the translators: at most {config['low_rank']}.")
    progress, ended = manifest["progress"], []
    if progress.get("ended_early"):
        ended.append(f"- The steps ended early: {for_markdown(progress['ended_early'])}.")
    if progress.get("bad_blocks"):
        ended.append(
            f"- Blocks left out because of values that are not finite: {progress['bad_blocks']}."
        )
    return [
        *shape,
        f"- Text: {for_markdown(text)}, blocks of {config['corpus']['seq_len']} tokens.",
        f"- Fit: {config['fit']}, with {used}, in {progress['seconds']:.0f} s on {run['device']} "
        f"({config['precision']}), seed {config['seed']}.",
        *ended,
        f"- Version: tunedlens {run['versions']['tunedlens']}.",
    ]


def with_front_matter(text: str, manifest: JsonObject, license_id: str | None = None) -> str:
    """A card with the front matter of a lens; entries that the card has already are kept.

    Args:
        license_id: replaces the license of the card.

    Raises:
        InputError: the card begins with front matter that is not YAML.
    """
    found = _FRONT_MATTER.match(text)
    what = "the front matter of the card"
    own = (parse_yaml(found[1], what) or {}) if found else {}
    if not isinstance(own, dict):
        raise InputError(f"{what} is damaged: expected lines like `license: mit`")
    entries = _front_matter(manifest) | own
    if license_id is not None:
        entries["license"] = license_id
    body = text[found.end() :] if found else text
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _front_matter(manifest: JsonObject) -> JsonObject:
    """The entries that the hub shows and searches, with models and datasets that are on the hub."""
    entries: JsonObject = {"library_name": "tunedlens"} if "format" in manifest else {}
    model = manifest["model"]
    if model.get("revision") is not None:  # only a model from the hub has one
        entries["base_model"] = model["name"]
    dataset = manifest.get("config", {}).get("corpus", {}).get("dataset")
    with suppress(InputError):
        if dataset is not None and is_on_hub(dataset):
            entries["datasets"] = [dataset]
    return entries | {"tags": [f"{manifest['lens']}-lens", "interpretability"]}


def evaluation_section(evaluation: Evaluation, picture: str) -> str:
    """The results of an evaluation, as a section of a card.

    Args:
        picture: the path of a plot, from the card.
    """
    parts = [
        "\n## Evaluation",
        "\n".join(map(for_markdown, summary(evaluation))),
        f"{for_markdown(scored_text(evaluation))}. ± is one standard error, clustered by block.",
        markdown(kl_rows(evaluation)),
        f"![KL to the model's final distribution and other metrics, by layer]({picture})",
    ]
    return "\n\n".join(parts) + "\n"
