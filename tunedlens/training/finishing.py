"""The end of a run: score the lens, then write it with everything that made it."""

import dataclasses

from tunedlens import checkpoint, files, report
from tunedlens.evaluation import Evaluation
from tunedlens.fit import PreconditionedMuon
from tunedlens.lenses import AffineLens, LogitLens
from tunedlens.model import take_probe
from tunedlens.provenance import describe_run
from tunedlens.report import plots
from tunedlens.tracking import Tracker
from tunedlens.training.run import Run, TrainState


def finish(run: Run, state: TrainState, tracker: Tracker, lens: AffineLens) -> Evaluation:
    """Score the lens, write it, its card and its learning curve, and remove the state."""
    kind = checkpoint.kind_of(lens)
    lenses = {"logit": LogitLens.from_model(run.model), kind: lens}
    evaluation = run.validation_set.score(lenses, run.costs.table_tokens(state.progress.tokens))
    state.update_seconds()
    kl = evaluation.by_layer(kind, "kl_nats")
    tracker.summarise({f"held_out/kl_nats/{layer}": e.value for layer, e in enumerate(kl)})
    if run.is_main:
        splits = {"train": run.splits.train, "validation": run.splits.validation}
        metadata = {
            "config": dataclasses.asdict(run.plan),
            "corpus": {name: split.about for name, split in splits.items()},
            "progress": dataclasses.asdict(state.progress),
            "held_out": evaluation.to_json(),
            "probe": take_probe(run.model),
            "provenance": describe_run(run.model),
        }
        checkpoint.save_lens(lens, run.output, metadata)
        card = report.card(run.output.name, metadata, evaluation)
        files.write(run.output / "README.md", card)
        plots.draw_learning_curve(state.progress.history, run.output)
        checkpoint.remove_state(run.output)
    return evaluation


def best_lens(state: TrainState) -> AffineLens:
    """The result of the optimizer, with the closed form at layers that are worse than it."""
    history = state.progress.history
    if isinstance(state.optimizer, PreconditionedMuon) and history:
        pairs = zip(history[0].kl_nats, history[-1].kl_nats, strict=True)
        for layer, (first, last) in enumerate(pairs):
            if last > first:
                state.optimizer.revert(layer)
    return state.optimizer.result()
