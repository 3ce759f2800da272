"""`evaluate.py --prompt`: tables, heatmaps and an interactive page for every text."""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunedlens import checkpoint, files, report
from tunedlens.config import ModelConfig, configured
from tunedlens.errors import InputError
from tunedlens.evaluation.lens_specs import BASELINES, LensSpec, lens_specs, saved_lenses
from tunedlens.lenses import LogitLens, ResidualLens
from tunedlens.model import FrozenModel, load_configured
from tunedlens.progress import say
from tunedlens.tokenizer import chat_text
from tunedlens.trajectories import Trajectory, trajectory


def show_prompts(flags: dict[str, Any]) -> int:
    """Show texts through the layers of the logit lens and of saved lenses.

    Returns the exit status.
    """
    prompts = flags.pop("prompt", [])
    if "prompt_file" in flags:
        prompts = prompts + _read_file(flags.pop("prompt_file"))
    asked, output = flags.pop("lens", None), flags.pop("output", None)
    stride, bos = flags.pop("stride", None), flags.pop("bos", None)
    is_chat = flags.pop("chat", False)
    model_flags = {field.name for field in dataclasses.fields(ModelConfig)}
    if others := sorted(flags.keys() - model_flags):
        flag = f"--{others[0].replace('_', '-')}"
        raise InputError(f"--prompt scores no corpus, so it needs no {flag}")
    specs = lens_specs(asked) if asked else _newest(flags.get("model"))
    saved = saved_lenses(specs)
    if any(spec.kind in BASELINES for spec in specs):
        raise InputError("unigram and mean are the same for every prompt; leave them out")
    base = saved[0].trained.model if saved and "model" not in flags else ModelConfig()
    config = configured(base.on_any_device(), flags)
    output = output or (saved[0].results_folder if saved else Path()) / "prompts"
    files.require_writable(output)
    model = load_configured(config, None)
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
    _write_prompts(model, lenses, prompts, stride, output)
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


def _read_file(path: Path) -> list[str]:
    r"""The prompts of a file, one per line; `\n` in a line stands for a line break."""
    lines = files.read_text(path, f"there is no --prompt-file {path}").splitlines()
    prompts = [line.replace("\\n", "\n") for line in lines if line]
    if not prompts:
        raise InputError(f"--prompt-file {path} has no prompt: expected one in each line")
    return prompts


def _folder_name(prompt: str) -> str:
    """The first words of the prompt and a hash."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:24].strip("-")
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{words}-{digest}" if words else digest


def _write_prompts(
    model: FrozenModel,
    lenses: Mapping[str, ResidualLens],
    prompts: Sequence[str],
    stride: int | None,
    folder: Path,
) -> None:
    """Read every prompt, write its report and print the best tokens at its end."""
    # A bad prompt is noticed before anything is written.
    found = trajectory(model, lenses, list(prompts), stride=stride)
    within: list[Trajectory] = []
    with suppress(InputError):  # attention and MLP of a block may run in parallel
        sites = ["resid_mid", "resid_post"]
        within = trajectory(model, None, list(prompts), sites=sites, stride=stride)
    for index, (prompt, read) in enumerate(zip(prompts, found, strict=True)):
        written = folder / _folder_name(prompt)
        report.write_one_text(read, written, within[index] if within else None)
        last = read.vocabulary[int(read.input_ids[-1])].shown
        say(f"\n{prompt!r}\nbest tokens after {last}, with probabilities")
        for lens in lenses:
            table = report.top_k(read, lens=lens, k=3).to_text(is_coloured=sys.stdout.isatty())
            say(f"\n{lens} lens")
            say(table, has_colors=True)
        say(f"\nreport.md, with heatmaps, curves, tables and a page to explore, is in {written}")
