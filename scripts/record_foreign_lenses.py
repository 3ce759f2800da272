"""Records lenses and logits of other libraries, and checks that these libraries read our lenses.

The tests use the recorded files in tests/data/foreign_lenses. Each library runs in a separate
virtual environment with the versions below:

    python scripts/record_foreign_lenses.py model          this project; makes the tiny model
    python scripts/record_foreign_lenses.py tuned-lens     torch==2.13.0 "transformers<5"
                                                           tuned-lens==0.2.0 (and 0.1.0, 0.0.5)
    python scripts/record_foreign_lenses.py jacobian       torch==2.13.0 transformer-lens==4.3.0

With `--read FOLDER`, `model` writes lenses of this project and their logits to the folder instead,
and the other two read them with their library and compare the logits:

    python scripts/record_foreign_lenses.py model --read /tmp/ours
    python scripts/record_foreign_lenses.py tuned-lens --read /tmp/ours
    python scripts/record_foreign_lenses.py jacobian --read /tmp/ours
"""

import argparse
import importlib.metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parents[1] / "tests" / "data" / "foreign_lenses"
IDS = torch.tensor([[5, 90, 33, 200, 7, 7, 110, 64, 12, 250, 1, 77]])
RECORDED = slice(-1, None)
"""The position whose logits are recorded."""


def make_model() -> None:
    """A GPT-2 of width 8 whose tokens are the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 16, "n_embd": 8, "n_layer": 3, "n_head": 2}
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=256, eos_token_id=256, initializer_range=0.3)
    )
    model.transformer.ln_f.weight.data.normal_(1.0, 0.3)
    model.transformer.ln_f.bias.data.normal_(0.0, 0.3)
    model.save_pretrained(DATA / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(DATA / "model")


def write_ours(folder: Path) -> None:
    """Export random lenses of this project and the recorded lenses, with their logits by layer."""
    from tunedlens import JacobianLens, TunedLens, export_lens, load_lens, load_model

    model = load_model(DATA / "model", device="cpu")
    torch.manual_seed(1)
    tuned = TunedLens.from_model(model)
    for parameter in tuned.parameters():
        parameter.data.normal_(0.0, 0.3)
    lenses = {
        "tuned": tuned,
        "tuned-back": load_lens(DATA / "tuned-lens-0.2.0", model, check=False),
        "tuned-old-back": load_lens(DATA / "tuned-lens-0.0.5", model, check=False),
        "jacobian.pt": JacobianLens.from_jacobians(model, torch.randn(3, 8, 8)),
        "jacobian-back.pt": load_lens(DATA / "transformer-lens-4.3.0.pt", model),
    }
    states = model.residual_stream(IDS)
    with torch.no_grad():
        for name, lens in lenses.items():
            export_lens(lens, folder / name)
            logits = {str(i): lens(states[i], i).contiguous() for i in range(3)}
            save_file(logits, folder / f"{name.removesuffix('.pt')}.safetensors")


def compare(library: str, logits: dict[int, torch.Tensor], file: Path) -> None:
    """Print the largest difference between a library's logits and ours."""
    ours = load_file(file)
    errors = [float((logits[i] - ours[str(i)]).abs().max()) for i in logits]
    print(
        f"{library} reads {file.stem}: layers {sorted(logits)}, logits differ by {max(errors):.1e}"
    )
    assert max(errors) < 1e-4


def tuned_lens(ours: Path | None) -> None:
    """Record a tuned lens of the installed release of tuned-lens, or read ours with it."""
    from transformers import GPT2LMHeadModel
    from tuned_lens.nn.lenses import TunedLens

    version = importlib.metadata.version("tuned-lens")
    model = GPT2LMHeadModel.from_pretrained(DATA / "model").eval()
    model.config._name_or_path = "tiny"
    *states, _ = model(IDS, output_hidden_states=True).hidden_states
    with torch.no_grad():
        if ours is not None:
            for name in ("tuned", "tuned-back", "tuned-old-back"):
                lens = TunedLens.from_model_and_pretrained(model, str(ours / name))
                logits = {i: lens(state, i) for i, state in enumerate(states)}
                compare(f"tuned-lens {version}", logits, ours / f"{name}.safetensors")
            return
        torch.manual_seed(2)
        is_old = version.startswith("0.0.")
        lens = TunedLens(model) if is_old else TunedLens.from_model(model)
        for translator in lens:
            for parameter in translator.parameters():
                parameter.normal_(0.0, 0.3)
        folder = DATA / f"tuned-lens-{version}"
        lens.save(folder)
        logits = {
            str(i): lens(state, i)[0, RECORDED].contiguous() for i, state in enumerate(states)
        }
        save_file(logits, folder / "logits.safetensors")


def jacobian(ours: Path | None) -> None:
    """Record a Jacobian lens of TransformerLens, fitted on one text, or read ours with it."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis import JacobianLens
    from transformers import AutoTokenizer, GPT2LMHeadModel

    version = importlib.metadata.version("transformer-lens")
    model = GPT2LMHeadModel.from_pretrained(DATA / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(DATA / "model")
    bridge = TransformerBridge.boot_transformers(
        str(DATA / "model"), hf_model=model, tokenizer=tokenizer, device="cpu"
    )

    def read(path: Path) -> dict[int, torch.Tensor]:
        lens = JacobianLens.from_pretrained(str(path), model=bridge)
        result = lens.readout(bridge, IDS, return_full_logits=True)
        # Their l is the output of block l, which is state l + 1 here.
        return {i + 1: result.lens_logits[i][None] for i in lens.source_layers}

    if ours is not None:
        for name in ("jacobian.pt", "jacobian-back.pt"):
            file = (ours / name).with_suffix(".safetensors")
            compare(f"transformer-lens {version}", read(ours / name), file)
        return
    lens = JacobianLens.fit(bridge, ["a small text"], corpus="none", skip_first_positions=2)
    lens.metadata["model_name"] = bridge.cfg.model_name = "tiny"
    file = DATA / f"transformer-lens-{version}.pt"
    lens.save(str(file))
    logits = {str(i): one[0, RECORDED].contiguous() for i, one in read(file).items()}
    save_file(logits, file.with_suffix(".safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["model", "tuned-lens", "jacobian"])
    parser.add_argument("--read", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.part == "model":
        make_model() if arguments.read is None else write_ours(arguments.read)
    elif arguments.part == "tuned-lens":
        tuned_lens(arguments.read)
    else:
        jacobian(arguments.read)


if __name__ == "__main__":
    main()
