"""The model and the text, which every command reads."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from tunedlens.config.base import Config, Dtype, option


@dataclass(frozen=True)
class ModelConfig(Config):
    """The model, and where it runs."""

    model: str | None = option(
        None, "hub name (gpt2, distilgpt2, ...) or folder (default: the embedded GPT-2)"
    )
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    dtype: Dtype = option("float32", "dtype of the model's weights")
    device: str | None = option(None, "cpu, cuda, mps, ... (default: the fastest one available)")
    device_map: str | None = option(
        None,
        "auto, balanced, balanced_low_0 or sequential: spread the model over all devices and the "
        "memory of the CPU; replaces --device",
    )
    fsdp: bool = option(
        False,
        "divide the weights of the model among the processes (FSDP), if it is larger than one GPU",
    )
    adapter: str | None = option(
        None, "folder or hub name of a PEFT adapter to merge into the model (needs peft)"
    )
    gguf_file: str | None = option(
        None, "name of a GGUF file with the weights, in the folder or on the hub"
    )
    trust_remote_code: bool = option(
        False, "run code from the model's repository; use it only with a repository that you trust"
    )
    blocks: str | None = option(
        None,
        "path of the list of blocks in the model, such as model.layers, if it is not found "
        "automatically",
        metavar="MODULE",
    )
    final_norm: str | None = option(
        None,
        "path of the final norm in the model, such as model.norm, if it is not found "
        "automatically; none for a model without a final norm",
        metavar="MODULE",
    )

    def on_any_device(self) -> Self:
        """The same model, wherever it runs on this machine."""
        return dataclasses.replace(self, device=None, device_map=None, fsdp=False)


@dataclass(frozen=True)
class CorpusConfig(Config):
    """The text, and how it is divided into blocks."""

    dataset: str | None = option(
        None,
        "file, folder, glob (.txt .md .py .jsonl .json .csv .parquet) or hub name, or self for "
        "text sampled from the model (default: the embedded model's own text; for other models, "
        "OpenWebText from the hub)",
    )
    dataset_config: str | None = option(None, "configuration of a dataset on the hub")
    dataset_split: str = option("train", "split of a dataset on the hub")
    dataset_revision: str | None = option(None, "branch, tag or commit of a dataset on the hub")
    validation_split: str | None = option(
        None,
        "split of a dataset on the hub to hold out (default: a fraction of the documents, chosen "
        "by their hash, or a fraction of the blocks if there is one document)",
    )
    text_column: str | None = option(
        None, "column with the text (default: `text`, or the only column of strings)"
    )
    chat: bool = option(
        False,
        "render conversations (lists of {role, content} in the column `messages`, or in "
        "--text-column) with the tokenizer's chat template; a --prompt becomes a user's turn",
    )
    self_tokens: int | None = option(
        None, "tokens to sample for --dataset self (default: the most that the run can need)"
    )
    streaming: bool = option(False, "read the text during the run instead of all at its start")
    seq_len: int | None = option(
        None, "tokens in a block (default: the model's context, at most 1024)"
    )
    bos: bool | None = option(
        None,
        "start every block with the tokenizer's BOS token (default: only if the tokenizer itself "
        "adds one)",
    )
