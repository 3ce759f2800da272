"""`tunedlens list`: shows the lenses in a folder."""

from pathlib import Path
from statistics import fmean

from tunedlens import checkpoint
from tunedlens.cli.flags import Parser
from tunedlens.cli.guard import Arguments, command
from tunedlens.errors import InputError
from tunedlens.evaluation import Estimate
from tunedlens.evaluation.lens_specs import SavedLens
from tunedlens.files import JsonObject
from tunedlens.model import TRANSLATED_SITES
from tunedlens.progress import say
from tunedlens.report.tables import plus_minus

LIST = """Show the lenses in a folder: model, kind, sites, layers, tokens, held-out KL and date."""

_HEADER = ("folder", "model", "kind", "sites", "layers", "tokens", "KL, nats", "date")


@command
def list_command(arguments: Arguments = None) -> int:
    """`tunedlens list`. Returns the exit status."""
    parser = Parser("tunedlens list", description=LIST)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=checkpoint.ROOT,
        metavar="DIR",
        help="a lens, or a folder of lenses (default: %(default)s)",
    )
    root = parser.parse_args(arguments).folder
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    folders = [folder for folder in [root, *sorted(root.iterdir())] if _is_run(folder)]
    if not folders:
        say(f"there is no lens in {root}")
        return 0
    lines = [list(_HEADER), *map(_line, folders)]
    rows = [line for line in lines if len(line) == len(_HEADER)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for line in lines:
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False))
        say("  ".join(cells).rstrip() if line in rows else "  ".join(line))
    return 0


def _is_run(folder: Path) -> bool:
    files = (checkpoint.MANIFEST, checkpoint.WEIGHTS)
    return checkpoint.has_state(folder) or any((folder / file).is_file() for file in files)


def _line(folder: Path) -> list[str]:
    """A row of the table; for an interrupted or damaged run, the folder and a message."""
    if checkpoint.has_state(folder) and not (folder / checkpoint.MANIFEST).exists():
        return [str(folder), f"interrupted; continue with: tunedlens train --resume {folder}"]
    try:
        saved = SavedLens.read("", str(folder))
        manifest = saved.manifest
        points, rank = checkpoint.saved_points(folder), manifest.get("rank")
        sites, layers = ({point[part] for point in points} for part in (0, 1))
        is_whole = layers == set(range(int(manifest["model"]["n_layers"])))
        return [
            str(folder),
            str(manifest["model"]["name"]),
            saved.kind if rank is None else f"{saved.kind}, rank {rank}",
            ",".join(site for site in TRANSLATED_SITES if site in sites),
            "all" if is_whole else ",".join(map(str, sorted(layers))),
            f"{sum(checkpoint.trained_tokens(manifest)):,}" if "progress" in manifest else "–",
            _held_out_kl(manifest) if "held_out" in manifest else "–",
            str(manifest["created"])[:16].replace("T", " "),
        ]
    except InputError as error:
        return [str(folder), f"damaged: {error}"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return [str(folder), f"damaged: {checkpoint.MANIFEST} has no valid {error}"]


def _held_out_kl(manifest: JsonObject) -> str:
    """The mean KL of the lens over layers, at its first site.

    Version 0.1.0 saved neither the mean nor its error.
    """
    results = [r for r in manifest["held_out"]["results"] if r["metric"] == "kl_nats"]
    names = [r["lens"] for r in results if r["lens"].split()[0] != "logit"]
    own = [r for r in results if r["lens"] == names[0]]
    for result in own:
        if result["layer"] is None:
            return plus_minus(Estimate(result["value"], result["standard_error"]))
    return plus_minus(Estimate(fmean(r["value"] for r in own), None))
