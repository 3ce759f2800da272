"""The README of a saved lens."""

from tunedlens.config import ONE_PASS
from tunedlens.evaluation import Evaluation
from tunedlens.files import JsonObject
from tunedlens.report.tables import kl_rows, markdown


def card(name: str, manifest: JsonObject, evaluation: Evaluation) -> str:
    """A short README for a saved lens: how it was made, and its KL table."""
    config, corpus = manifest["config"], manifest["corpus"]["train"]
    text = f"{corpus['dataset']}"
    if "tokens_sha256" in corpus:
        text += f" ({corpus['bytes']:,} bytes; tokens' SHA-256 {corpus['tokens_sha256'][:16]}…)"
    model, versions = manifest["provenance"]["model"], manifest["provenance"]["versions"]
    kind = evaluation.lenses[-1]
    first = f"{manifest['progress']['init_tokens']:,} tokens"
    if config["fit"] not in ONE_PASS:
        first += f" for the closed form and {manifest['progress']['tokens']:,} for the steps"
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A {kind} lens for `{model}`, made by tunedlens {versions['tunedlens']}.",
            "",
            f"- Text: {text}, blocks of {config['corpus']['seq_len']} tokens.",
            f"- Fit: {config['fit']}, with {first}, in "
            f"{manifest['progress']['seconds']:.0f} s on {manifest['provenance']['device']} "
            f"({config['precision']}), seed {config['seed']}.",
            "- Everything else is in `config.json`; load it with `tunedlens.load_lens`.",
            "",
            f"KL(model ‖ lens) in nats on {evaluation.tokens:,} held-out tokens, ± one standard "
            "error:",
            "",
            markdown(kl_rows(evaluation)),
            "",
        ]
    )
