"""What a report of an evaluation explains: how to read it, its terms and its metrics."""

from tunedlens.builtin import NAME
from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS

HOW_TO_READ = (
    "A lens predicts the next token from the hidden state at one layer. KL(model ‖ lens) says how "
    "far its prediction is from the model's own: the lens with the lowest KL is the closest to the "
    "model, and 0 means that both are equal. ± is one standard error."
)
ABOUT_DIFFERENCES = (
    "Both lenses of a pair are scored on the same tokens. Below 0, the first one is closer to the "
    "model. ± is the standard error of the difference."
)
ABOUT_DEPTHS = (
    "The prediction depth of a token is the first layer from which the lens's most probable token "
    "no longer changes. A row has the fraction of tokens with this depth; in the last layer's row, "
    "only the model itself predicts the token. The row “mean” is the mean depth in layers. No "
    "depth is better than another: it says how early the prediction can be read from the states."
)


def terms(evaluation: Evaluation) -> dict[str, str]:
    """The words that the report uses, with their meanings."""
    config = evaluation.provenance.get("config", {})
    corpus = config.get("corpus", {})
    length = corpus.get("seq_len")
    size = f"{length:,} consecutive tokens" if length else "consecutive tokens"
    found = {
        "layer": "the state that enters the block of this number; layer 0 is the embeddings, and "
        f"layer {evaluation.n_layers} is decoded to the model's own output",
        "lens": "decodes the state at a layer to a distribution over the next token; the logit "
        "lens applies the model's final norm and unembedding, and a tuned lens first applies a map "
        "that is trained for each layer, its translator",
        "nat": "unit of information with the natural logarithm, 1.44 bits",
        "position": "a token of the text after which the next one is predicted",
        "block": f"{size} of the text, which the model reads at once",
        "±": "one standard error, clustered by block because tokens of a block are not "
        "independent; bands and error bars in plots are two on either side",
    }
    if corpus.get("dataset") == NAME:
        found[f"{NAME} text"] = "the source files of Python's standard library"
    if config.get("split") == "validation":
        found["held out"] = (
            "the part of the text that was kept out of the training of every lens here"
        )
    if evaluation.transfer:
        found["transfer"] = "the translator of one layer applied to the states of another"
    baselines = {
        "unigram": "baseline: the token frequencies of the training text, whatever the input",
        "mean": "baseline: the model's mean distribution, whatever the input",
    }
    return found | {name: baselines[name] for name in evaluation.constant if name in baselines}


def metric_terms(evaluation: Evaluation) -> dict[str, str]:
    """The metrics with their meanings, by title; a shorter one in tables is given too."""
    shown = {name: one for name, one in METRICS.items() if name in evaluation.metrics}
    return {
        f"{one.title} (in tables: {one.column})" if one.column else one.title: one.meaning
        for one in shown.values()
    }
