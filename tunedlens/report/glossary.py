"""The explanations in a report of an evaluation: how to read it, its terms and its metrics."""

from tunedlens.builtin import NAME
from tunedlens.evaluation import Evaluation
from tunedlens.metrics import METRICS

HOW_TO_READ = (
    "A lens predicts the next token from the hidden state at one layer. KL(model ‖ lens) measures "
    "how far its prediction is from the model's own. It is 0 if both are equal, and lower values "
    "are closer to the model. ± is one standard error."
)
ABOUT_DIFFERENCES = (
    "Both lenses of a pair are scored on the same tokens. A value below 0 means that the first "
    "lens is closer to the model. ± is the standard error of the difference."
)
ABOUT_DEPTHS = (
    "The prediction depth of a token is the first layer from which the lens's most probable token "
    "no longer changes. Each row shows the fraction of tokens with that depth; the row of the last "
    "layer counts the tokens that only the model itself predicts. The row “mean” is the mean depth "
    "in layers. A lower depth is neither better nor worse: the depth shows how early the "
    "prediction can be read from the states."
)


def terms(evaluation: Evaluation) -> dict[str, str]:
    """The words that the report uses, with their meanings."""
    config = evaluation.provenance.get("config", {})
    corpus = config.get("corpus", {})
    length = corpus.get("seq_len")
    size = f"{length:,} consecutive tokens" if length else "consecutive tokens"
    found = {
        "layer": "the state that enters the block with this number; layer 0 is the embeddings, and "
        f"layer {evaluation.n_layers} is decoded to the model's own output",
        "lens": "decodes the state at a layer to a distribution over the next token; the logit "
        "lens applies the model's final norm and unembedding, and a tuned lens first applies a map "
        "that is trained for each layer, its translator",
        "nat": "unit of information based on the natural logarithm; 1 nat is 1.44 bits",
        "position": "a token of the text, from which the next token is predicted",
        "block": f"{size} of the text that the model reads together",
        "±": "one standard error, clustered by block because the tokens of a block are not "
        "independent; bands and error bars in plots show two standard errors on either side",
    }
    if corpus.get("dataset") == NAME:
        found[f"{NAME} text"] = "the source files of Python's standard library"
    if config.get("split") == "validation":
        found["held out"] = "the part of the text that was not used to train any of these lenses"
    if evaluation.transfer:
        found["transfer"] = "applying the translator of one layer to the states of another layer"
    baselines = {
        "unigram": "baseline: the token frequencies of the training text, the same for every input",
        "mean": "baseline: the model's mean distribution, the same for every input",
    }
    return found | {name: baselines[name] for name in evaluation.constant if name in baselines}


def metric_terms(evaluation: Evaluation) -> dict[str, str]:
    """The metrics with their meanings, by title; a shorter one in tables is given too."""
    shown = {name: one for name, one in METRICS.items() if name in evaluation.metrics}
    return {
        f"{one.title} (in tables: {one.column})" if one.column else one.title: one.meaning
        for one in shown.values()
    }
