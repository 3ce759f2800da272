"""`tunedlens doctor`: checks a model, and a lens for it."""

from tunedlens import checkpoint
from tunedlens.cli.flags import make_parser, parse
from tunedlens.cli.guard import Arguments, command
from tunedlens.config import ModelConfig, configured
from tunedlens.doctor import doctor
from tunedlens.evaluation.lens_specs import SavedLens
from tunedlens.model import load_configured
from tunedlens.progress import say

DOCTOR = """Check a model, and a lens for it: which parts were found, and whether they are correct.

  tunedlens doctor --model gpt2
  tunedlens doctor --lens checkpoints/RUN                the lens, on the model it was trained on
  tunedlens doctor --lens checkpoints/RUN --model OTHER

The exit status is 1 if a check fails.
"""


@command
def doctor_command(arguments: Arguments = None) -> int:
    """`tunedlens doctor`. Returns the exit status."""
    parser = make_parser("tunedlens doctor", DOCTOR, ModelConfig)
    parser.add_argument("--lens", metavar="LENS", help="path of a lens, or name on the hub")
    flags = parse(parser, arguments)
    lens = checkpoint.find_lens(flags.pop("lens")) if "lens" in flags else None
    base = ModelConfig()
    if lens is not None and "model" not in flags:
        base = SavedLens.read("", str(lens)).trained.model.on_any_device()
    model = load_configured(configured(base, flags), None, check=False)
    diagnosis = doctor(model, lens)
    say(str(diagnosis))
    return 0 if diagnosis.passed else 1
