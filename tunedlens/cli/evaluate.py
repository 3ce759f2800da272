"""`evaluate.py`: evaluates lenses on a text and writes a report."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tunedlens import checkpoint, files, report
from tunedlens.cli.flags import add_wandb_flag, make_parser, parse
from tunedlens.cli.guard import Arguments, command
from tunedlens.cli.prompt import add_prompt_flags, require_prompt, show_prompts
from tunedlens.config import EvaluateConfig, ModelConfig, configured
from tunedlens.distributed import join_processes
from tunedlens.errors import InputError
from tunedlens.evaluation import evaluate
from tunedlens.evaluation.lens_specs import (
    SavedLens,
    lens_specs,
    model_as_trained,
    saved_lenses,
    trained_on,
)
from tunedlens.evaluation.text import require_as_trained
from tunedlens.progress import say
from tunedlens.tracking import Tracker

EVALUATE = """Evaluate lenses on held-out text. The logit lens is always included.

Without flags, the newest lens in checkpoints/ is evaluated on the text that it was trained on.

  tunedlens evaluate --lens checkpoints/RUN --tokens 1e6
  tunedlens evaluate --lens unigram --lens mean --lens checkpoints/A --lens mine=checkpoints/B
  tunedlens evaluate --dataset other.txt        all of this text, because no lens was trained on it
  tunedlens evaluate --lens checkpoints/RUN --beside MODEL   the same lens on a fine-tuned model
  tunedlens evaluate --prompt "The Eiffel Tower is in the city of"
  tunedlens evaluate --redraw DIR               write all tables and plots again, without a model
"""


@command
def evaluate_command(arguments: Arguments = None) -> int:
    """`python evaluate.py` and `tunedlens evaluate`. Returns the exit status."""
    flags = parse(_parser(), arguments)
    command = ["tunedlens", "evaluate", *(sys.argv[1:] if arguments is None else arguments)]
    if "redraw" in flags:
        return _redraw(flags.pop("redraw"), others=list(flags))
    if "prompt" in flags or "prompt_file" in flags:
        return show_prompts(flags, command)
    require_prompt(flags)
    lenses, output = flags.pop("lens", None), flags.pop("output", None)
    wandb = flags.pop("wandb", "disabled")
    if lenses is None:
        lenses = [str(checkpoint.newest_lens(checkpoint.ROOT))]
        command += ["--lens", *lenses]
    saved = saved_lenses(lens_specs(lenses))
    base = EvaluateConfig(lenses=tuple(lenses), model=model_as_trained(ModelConfig(), saved))
    config = configured(base, flags)
    same_text = trained_on(saved, config.corpus.dataset)
    if same_text:  # the config cannot tell an explicit default from an open setting
        require_as_trained(flags, same_text[0].trained.corpus)
    output = output or _default_output(saved, config, is_other_text=not same_text)
    report.require_own(output)
    files.require_writable(output)

    accelerator = join_processes(config.model.device)
    is_main = accelerator.is_main_process
    if is_main and same_text and config.split in ("train", "all"):
        say(f"note: --split {config.split} scores text that {same_text[0].source} was trained on")
    if is_main:
        say(f"scoring {', '.join(config.lenses)} and the logit lens; output: {output}")
    evaluation = evaluate(config, accelerator=accelerator, command=command)
    if not is_main:
        return 0
    report.write_report(evaluation, output)
    settings = evaluation.provenance["config"]
    with Tracker(wandb, f"evaluate {output}", settings, output) as tracker:
        tracker.report(evaluation, report.pictures(output))
    say(report.terminal_table(evaluation))
    say(f"\n{report.scored_text(evaluation)}; ± one standard error, clustered by block")
    say(f"tables, plots and report.html are in {output}")
    if evaluation.tokens < settings["tokens"]:
        ended = f"the text ran out after {evaluation.tokens:,} of {settings['tokens']:,} positions"
        if config.tokens is not None:
            raise InputError(f"{ended}; the results are in {output}")
        say(ended)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tunedlens evaluate", EVALUATE, EvaluateConfig)
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--lens",
        action="append",
        metavar="[NAME=]LENS",
        help="path of a lens, name on the hub (user/name[@revision][:subfolder]), unigram or mean; "
        "can be given several times (default: the newest saved lens)",
    )
    texts = {
        "output": "folder for the results (default: evaluation/ in the folder of the lens, or a "
        "folder in checkpoints/ for a lens from the hub)",
        "redraw": "write tables and plots again from the results saved in this folder",
    }
    for name, text in texts.items():
        group.add_argument(f"--{name}", type=Path, metavar="PATH", help=text)
    add_wandb_flag(group)
    add_prompt_flags(parser)
    return parser


def _redraw(folder: Path, others: list[str]) -> int:
    if others:
        other = f"--{others[0].replace('_', '-')}"
        raise InputError(f"--redraw does not work with {other}: it only reads {folder}")
    report.write_report(report.read_evaluation(folder), folder)
    say(f"wrote the tables, plots and report.html in {folder} again")
    return 0


def _default_output(
    saved: Sequence[SavedLens], config: EvaluateConfig, is_other_text: bool
) -> Path:
    """A folder in that of the first lens, named after a second model or another text.

    The folder of an evaluation of more tokens is not used.
    """
    name = "evaluation"
    if is_other_text and config.corpus.dataset is not None:
        name += f"-{Path(config.corpus.dataset).stem}"
    if config.beside is not None:
        name += f"-beside-{Path(config.beside.partition('=')[0]).name}"
    folder = (saved[0].results_folder if saved else Path()) / name
    with suppress(InputError):
        if config.tokens is not None and config.tokens < report.read_evaluation(folder).tokens:
            return folder.with_name(f"{name}-{config.tokens}-tokens")
    return folder
