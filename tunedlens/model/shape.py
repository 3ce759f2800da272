"""The sizes of a model that the memory and the operations of a run depend on."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from tunedlens.model.frozen import FrozenModel
from tunedlens.model.fsdp import has_plan
from tunedlens.model.quantised import count_weights
from tunedlens.model.structure import ModelParts, find_parts


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, which can be computed without its weights."""

    name: str
    n_layers: int
    d_model: int
    vocab_size: int
    weights: int
    """The number of parameters; shared ones count once."""
    block_weights: int
    """The number of parameters of the blocks, without embeddings and unembedding."""
    widest: int
    """The longest side of a weight in a block, usually the width of its MLP."""
    context: int | None
    """The longest sequence that the model reads, in tokens."""
    has_bias: bool
    """Whether the unembedding has a bias."""
    is_scaled: bool
    """Whether the model multiplies its logits by a constant."""
    is_capped: bool
    """Whether the model caps its logits."""
    has_fsdp_plan: bool
    """Whether transformers can divide the weights among processes."""


def shape_of(model: FrozenModel) -> ModelShape:
    """The shape of a loaded model."""
    return _shape(model.name, model.model, model.parts)


def shape_without_weights(
    name: str, model: PreTrainedModel, blocks: str | None = None, final_norm: str | None = None
) -> ModelShape:
    """The shape of a model whose tensors may be on the meta device.

    Raises:
        InputError: the blocks or the final norm cannot be found.
    """
    return _shape(name, model, find_parts(model, blocks, final_norm))


def _shape(name: str, model: PreTrainedModel, parts: ModelParts) -> ModelShape:
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    assert isinstance(head, nn.Module), "`find_parts` requires a head"
    return ModelShape(
        name=name,
        n_layers=len(parts.blocks),
        d_model=config.hidden_size,
        vocab_size=int(getattr(head, "out_features", None) or head.weight.shape[0]),  # type: ignore[index]
        weights=sum(parameter.numel() for parameter in model.parameters()),
        block_weights=count_weights(parts.blocks),
        widest=max(
            (side for p in parts.blocks.parameters() for side in p.shape),
            default=config.hidden_size,
        ),
        context=getattr(config, "max_position_embeddings", None),
        has_bias=getattr(head, "bias", None) is not None,
        is_scaled=parts.logit_scale != 1,
        is_capped=parts.logit_cap is not None,
        has_fsdp_plan=has_plan(model, parts),
    )
