"""`evaluate.py --prompt`: shows texts through the layers, in the terminal and on one page."""

import argparse
import dataclasses
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tunedlens import checkpoint, files, report
from tunedlens.config import ModelConfig, configured
from tunedlens.errors import InputError
from tunedlens.evaluation.lens_specs import BASELINES, LensSpec, lens_specs, saved_lenses
from tunedlens.lenses import LogitLens, ResidualLens
from tunedlens.model import load_configured
from tunedlens.progress import say
from tunedlens.provenance import describe_run
from tunedlens.tokenizer import chat_text
from tunedlens.trajectories import Trajectory, trajectory

_K = 5
_LEAST_KEPT = 10
"""The smallest number of tokens per cell on the interactive page."""
_OWN_FLAGS = ("whole_file", "stride", "top_k", "sites")
"""Flags that work only with `--prompt` or `--prompt-file`."""


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for prompts."""
    group = parser.add_argument_group("prompts, which replace the text to score")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="show this text through the layers; can be given several times",
    )
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="PATH",
        help=r"file with one prompt per line; \n in a line stands for a line break",
    )
    group.add_argument(
        "--whole-file",
        action="store_true",
        help="read all lines of --prompt-file as one prompt, without the last line break",
    )
    group.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="divide a prompt that is longer than the context into windows that start this many "
        "tokens apart",
    )
    group.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        help=f"number of best tokens that the tables show for each layer (default: {_K})",
    )
    group.add_argument(
        "--sites",
        metavar="SITES",
        help="sites that the lenses read, separated by commas: resid_pre (default), attn_out, "
        "resid_mid, mlp_out, resid_post",
    )


def require_prompt(flags: Collection[str]) -> None:
    """Check that no flag for prompts is given without a prompt.

    Raises:
        InputError: one is given.
    """
    for name in _OWN_FLAGS:
        if name in flags:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} works only with --prompt or --prompt-file")


def show_prompts(flags: dict[str, Any], command: Sequence[str]) -> int:
    """Show texts through the layers of the logit lens and of saved lenses.

    Args:
        flags: the flags of the command line.
        command: the command line, which the page shows.

    Returns:
        The exit status.
    """
    prompts = flags.pop("prompt", [])
    prompts += _in_file(flags.pop("prompt_file", None), flags.pop("whole_file", False))
    k, sites = flags.pop("top_k", _K), flags.pop("sites", "resid_pre").split(",")
    asked, output = flags.pop("lens", None), flags.pop("output", None)
    stride, bos = flags.pop("stride", None), flags.pop("bos", None)
    is_chat = flags.pop("chat", False)
    model_flags = {field.name for field in dataclasses.fields(ModelConfig)}
    if others := sorted(flags.keys() - model_flags):
        flag = f"--{others[0].replace('_', '-')}"
        raise InputError(f"{flag} does not work with --prompt; leave it out")
    specs = lens_specs(asked) if asked else _newest(flags.get("model"))
    saved = saved_lenses(specs)
    if any(spec.kind in BASELINES for spec in specs):
        raise InputError("unigram and mean predict the same for every prompt; leave them out")
    output = output or (saved[0].results_folder if saved else Path()) / "prompts"
    report.require_no_evaluation(output)
    files.require_writable(output)
    base = saved[0].trained.model if saved and "model" not in flags else ModelConfig()
    model = load_configured(configured(base.on_any_device(), flags), None)
    if bos is None and saved:
        bos = saved[0].trained.corpus.bos
    if bos is not None:
        model.set_bos(bos)
    lenses: dict[str, ResidualLens] = {
        spec.name: checkpoint.load_lens(spec.folder, model) for spec in saved
    }
    lenses["logit"] = LogitLens.from_model(model)
    if is_chat:
        turns = [{"role": "user", "content": prompt} for prompt in prompts]
        prompts = [chat_text(model.tokenizer, [turn], for_reply=True) for turn in turns]
    # All prompts are read before anything is written, in case one of them is invalid.
    kept = max(k, _LEAST_KEPT) if k > 0 else k
    read = trajectory(model, lenses, prompts, sites=sites, k=kept, stride=stride)
    for prompt, one in zip(prompts, read, strict=True):
        _print(prompt, one, k)
    about = {spec.name: spec.source for spec in saved} | {"logit": "final norm and unembedding"}
    path = report.write_texts(read, output, describe_run(model, command), about, k=k)
    say(f"\nheatmaps, curves and tables of all prompts are in {output}; to look at them, open")
    say(path.resolve().as_uri())
    return 0


def _newest(model: str | None) -> list[LensSpec]:
    """The newest lens if it was made for the model; else the logit lens, with a message."""
    try:
        specs = lens_specs([str(checkpoint.newest_lens(checkpoint.ROOT))])
        made_for = saved_lenses(specs)[0].manifest["model"]["name"]
        if model in (None, made_for):
            return specs
        reason = f"the newest lens was made for {made_for}; choose another with --lens"
    except InputError as error:
        reason = str(error)
    say(f"only the logit lens is shown: {reason}")
    return lens_specs([])


def _in_file(path: Path | None, is_whole: bool) -> list[str]:
    r"""The prompts in a file, if there is one.

    Every line is a prompt, in which `\n` stands for a line break, or the whole file is one prompt.
    """
    if path is None:
        if is_whole:
            raise InputError("--whole-file works only with --prompt-file; give that too")
        return []
    text = files.read_text(path, f"there is no --prompt-file {path}")
    if is_whole:
        found = [text.removesuffix("\n").removesuffix("\r")]
    else:
        found = [line.replace("\\n", "\n") for line in text.splitlines()]
    found = [prompt for prompt in found if prompt]
    if not found:
        expected = "some text" if is_whole else "one in each line"
        raise InputError(f"--prompt-file {path} has no prompt: expected {expected}")
    return found


def _print(prompt: str, read: Trajectory, k: int) -> None:
    """Print the best tokens at the end of a prompt."""
    last = read.vocabulary[int(read.input_ids[-1])].shown
    say(f"\n{prompt!r}\nbest tokens after {last}, with probabilities")
    for lens in read.predictions:
        table = report.top_k(read, lens=lens, k=k).to_text(is_coloured=sys.stdout.isatty())
        say(f"\n{lens} lens")
        say(table, has_colors=True)
