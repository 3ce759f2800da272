"""The model and the text, which every command reads."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from tunedlens.config.base import Config, Dtype, option


@dataclass(frozen=True)
class ModelConfig(Config):
    """Which model is examined, and where it runs."""

    model: str | None = option(
        None, "hub name (gpt2, distilgpt2, ...) or folder; without it, the embedded GPT-2"
    )
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    dtype: Dtype = option("float32", "dtype of the model's weights")
    device: str | None = option(None, "cpu, cuda, mps, ...; without it, the fastest one available")
    device_map: str | None = option(
        None,
        "auto, balanced, balanced_low_0 or sequential: spread the model over all devices (and the "
        "memory of the CPU), instead of --device",
    )
    fsdp: bool = option(
        False,
        "divide the weights of the model among the processes (FSDP), if it is larger than one GPU",
    )
    adapter: str | None = option(
        None, "folder or hub name of a PEFT adapter that is merged into the model (needs peft)"
    )
    gguf_file: str | None = option(
        None, "GGUF file in the folder or on the hub that holds the weights"
    )
    trust_remote_code: bool = option(
        False, "run the code that the model's repository brings along; only for one that you trust"
    )
    blocks: str | None = option(
        None,
        "path of the list of blocks, such as model.layers, if it is not found by itself",
        metavar="MODULE",
    )
    final_norm: str | None = option(
        None,
        "path of the final norm, such as model.norm, if it is not found; none for no norm",
        metavar="MODULE",
    )

    def on_any_device(self) -> Self:
        """The same model, wherever it runs on this machine."""
        return dataclasses.replace(self, device=None, device_map=None, fsdp=False)


@dataclass(frozen=True)
class CorpusConfig(Config):
    """Which text is read, and how it is divided into blocks."""

    dataset: str | None = option(
        None,
        "file, folder, glob (.txt .md .py .jsonl .json .csv .parquet) or hub name, or self for "
        "text sampled from the model; without it, the embedded model's own text, or OpenWebText "
        "from the hub for another model",
    )
    dataset_config: str | None = option(None, "configuration of a dataset on the hub")
    dataset_split: str = option("train", "split of a dataset on the hub")
    dataset_revision: str | None = option(None, "branch, tag or commit of a dataset on the hub")
    validation_split: str | None = option(
        None,
        "split of a dataset on the hub to hold out; without it, a fraction of the documents, "
        "chosen by their hash (of the blocks, if there is one document)",
    )
    text_column: str | None = option(
        None, "column with the text; without it, `text` or the only column of strings"
    )
    chat: bool = option(
        False,
        "render the conversations of the column `messages` (lists of {role, content}; see "
        "--text-column) with the tokenizer's chat template; a --prompt becomes a user's turn",
    )
    self_tokens: int | None = option(
        None, "tokens to sample for --dataset self (default: as many as the run needs at most)"
    )
    streaming: bool = option(False, "read the text while training instead of all at once")
    seq_len: int | None = option(
        None, "tokens in a block; without it, the model's context, at most 1024"
    )
    bos: bool | None = option(
        None,
        "start every block with the tokenizer's BOS token; without it, if the tokenizer itself "
        "puts one before a text",
    )
