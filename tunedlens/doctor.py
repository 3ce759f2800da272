"""Checks a model, and a lens for it: which parts were found, and whether they are correct."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from tunedlens.checkpoint import describe_lens, find_lens, load_lens
from tunedlens.devices import float32_products
from tunedlens.distributed import rank_and_count
from tunedlens.engine import kl_by_layer
from tunedlens.errors import InputError
from tunedlens.lenses import AffineLens, LogitLens
from tunedlens.model import FrozenModel, probe_kl, probe_tolerance
from tunedlens.sampling import only_settings

_TEXT = """The harbour was quiet in the early morning. A few boats lay at the pier, and the men who
worked on them talked about the weather, which had been bad for a week. In 1987 the town had 12,000
people; today it has half as many.

import os

def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [line.rstrip() for line in file]
"""
_TOKENS = 128
_BOS_GAIN = 0.5
"""Texts must begin with BOS if it lowers the cross-entropy by more than this, in nats."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    passed: bool | None
    """None if the check does not apply to the model."""
    detail: str = ""
    """The finding, and what to do about it."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`; `print` shows it as text."""

    facts: dict[str, str]
    """The parts of the model, by name."""
    checks: list[Check]
    norms: list[tuple[float, float]] = field(default_factory=list)
    """By layer: the norm of the state at position 0, and the median norm at later positions."""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        width = max(len(name) for name in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        marks = {True: "pass", False: "FAIL", None: "  – "}
        lines.append("")
        for check in self.checks:
            detail = f": {check.detail}" if check.detail else ""
            lines.append(f"{marks[check.passed]}  {check.name}{detail}")
        lines += ["", "norm of the states      position 0   later positions (median)"]
        for layer, (first, later) in enumerate(self.norms):
            lines.append(f"  layer {layer:<3} {first:>22.4g} {later:>17.4g}")
        return "\n".join(lines)


@float32_products()
@torch.no_grad()
def doctor(model: FrozenModel, lens: str | Path | None = None, text: str = _TEXT) -> Diagnosis:
    """Check a model, and optionally a saved lens for it.

    Args:
        model: can be loaded with `check=False`; faults are then reported instead of raised.
        lens: the folder of a saved lens, or its name on the hub.
        text: the text that the model reads; the first 128 tokens are used.
    """
    ids = _first_tokens(model, text)
    checks = list(_model_checks(model, ids))
    if lens is not None:
        checks += _lens_checks(model, find_lens(lens), ids)
    states = model.residual_stream(ids)
    norms = [state[0].float().norm(dim=-1) for state in states]
    sizes = [(float(norm[0]), float(norm[1:].median())) for norm in norms]
    return Diagnosis(_facts(model), checks, sizes)


@torch.no_grad()
def warn_of_faults(
    model: FrozenModel, *, is_bos_default: bool = False, is_sampled: bool = False
) -> None:
    """Warn of each fault that makes numbers wrong and takes a few short forward passes to find.

    `train` and `evaluate` call this; whether the final state decodes to the model's logits is
    checked when a model is loaded. Of several processes, the first one warns.

    Args:
        is_bos_default: whether the tokenizer's default decides if texts begin with BOS.
        is_sampled: whether the model generates text, for which it uses its cache.
    """
    ids = _first_tokens(model, _TEXT)
    checks = [_hidden_states(model, ids)]
    if is_bos_default:
        checks.append(_bos(model, ids))
    if is_sampled:
        checks.append(_cache(model, ids))
    for check in checks:
        if check.passed is False and rank_and_count()[0] == 0:
            warnings.warn(
                f"{model.name} fails a check ({check.name}): {check.detail} (see tunedlens doctor)",
                stacklevel=3,
            )


def _first_tokens(model: FrozenModel, text: str) -> Int[Tensor, "1 seq"]:
    return model.encode(text, is_any_length=True)[:, : min(_TOKENS, model.context or _TOKENS)]


def _facts(model: FrozenModel) -> dict[str, str]:
    parts, identity, config = model.parts, model.identity, model.model.config
    names = {module: name for name, module in model.model.named_modules()}
    block = type(parts.blocks[0]).__name__
    head, embeddings = parts.head, model.model.get_input_embeddings()
    is_tied = getattr(head, "weight", None) is getattr(embeddings, "weight", False)
    return {
        "model": f"{identity.name} ({type(model.model).__name__})",
        "blocks": f"{len(parts.blocks)} × {block} at {names[parts.blocks]}",
        "width": f"{identity.d_model}",
        "final norm": (
            f"{type(parts.entry).__name__} at {names[parts.entry]}" if parts.entry else "none"
        ),
        "unembedding": f"{names[head]}, {identity.vocab_size:,} tokens"
        + (", tied to the embedding" if is_tied else "")
        + (", with a bias" if model.unembedding.bias is not None else ""),
        "logit scale": f"{parts.logit_scale:g}",
        "logit cap": "none" if model.unembedding.cap is None else f"{model.unembedding.cap:g}",
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "context": f"{model.context or 'unknown'} tokens",
        "BOS": "none"
        if model.bos_id is None
        else f"{model.tokenizer.bos_token!r} before each text",
        "type": str(config.model_type),
    }


def _check(name: str, run: Callable[[], None]) -> Check:
    """A check that fails when it raises InputError, with its message."""
    try:
        run()
    except InputError as error:
        return Check(name, False, str(error))
    return Check(name, True)


def _model_checks(model: FrozenModel, ids: Int[Tensor, "1 seq"]) -> Iterator[Check]:
    yield _check(
        "the last state decodes to the model's logits, also when they are large",
        model.check_parts,
    )
    yield _hidden_states(model, ids)
    yield _terms(model, ids)
    yield _padding(model, ids)
    yield _cache(model, ids)
    yield _bos(model, ids)


def _hidden_states(model: FrozenModel, ids: Int[Tensor, "1 seq"]) -> Check:
    name = "the states equal the hidden states of transformers"
    output = model.model(ids, use_cache=False, output_hidden_states=True)
    expected, states = output.hidden_states, model.residual_stream(ids)
    if not expected or len(expected) != len(states):
        return Check(name, None, "this model does not return hidden states")
    wrong = [i for i in range(len(states) - 1) if not _close(states[i], expected[i])]
    if not wrong:
        return Check(name, True)
    shifts = [
        shift
        for shift in (-1, 1)
        if all(
            _close(states[i], expected[i + shift])
            for i in range(max(0, -shift), len(states) - 1 - max(0, shift))
        )
    ]
    if shifts == [-1] and _starts_at_embeddings(model, ids, states):
        return Check(name, True, "transformers returns the state after each block")
    if shifts:
        where = "later" if shifts[0] == 1 else "earlier"
        return Check(name, False, f"state l is that of layer l {shifts[0]:+d}, one block {where}")
    return Check(name, False, f"the states differ at layers {', '.join(map(str, wrong))}")


def _starts_at_embeddings(
    model: FrozenModel, ids: Int[Tensor, "1 seq"], states: list[Tensor]
) -> bool:
    """Whether state 0, and no other, is the output of the embeddings."""
    embeddings = model.model.get_input_embeddings()(ids)
    return _close(states[0], embeddings) and not _close(states[1], embeddings)


def _terms(model: FrozenModel, ids: Int[Tensor, "1 seq"]) -> Check:
    name = "the outputs of attention and MLP add up to the residual stream"
    try:
        model.sites(ids)
    except InputError as error:
        try:
            model.sites(ids, wanted=("resid_pre", "attn_out", "mlp_out", "resid_post"))
        except InputError:
            return Check(name, None, str(error))
        return Check(name, True, "they run side by side, so there is no resid_mid")
    return Check(name, True)


def _padding(model: FrozenModel, ids: Int[Tensor, "1 seq"]) -> Check:
    name = "padding at the end does not change the states"
    padded = torch.cat([ids[:, :-2], ids[:, :2]], 1)
    mask = torch.ones_like(padded)
    mask[:, -2:] = 0
    pairs = zip(model.residual_stream(ids), model.residual_stream(padded, mask), strict=True)
    wrong = [i for i, (one, two) in enumerate(pairs) if not _close(one[:, :-2], two[:, :-2])]
    if wrong:
        layers = ", ".join(map(str, wrong))
        return Check(name, False, f"they change at layers {layers}; run one text at a time")
    return Check(name, True)


def _cache(model: FrozenModel, ids: Int[Tensor, "1 seq"]) -> Check:
    name = "the key-value cache does not change the logits"
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=2,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    start = ids[:, :-2]
    with only_settings(model, settings):
        written = model.model.generate(start, attention_mask=torch.ones_like(start))
    last = written.logits[-1]
    whole = model.model(written.sequences[:, :-1], use_cache=False).logits[:, -1]
    is_close = _close(whole.float(), last.float())
    return Check(name, is_close, "" if is_close else "the logits during generation differ")


def _bos(model: FrozenModel, ids: Int[Tensor, "1 seq"]) -> Check:
    name = "texts begin as in the model's training"
    bos = model.tokenizer.bos_token_id
    if bos is None:
        return Check(name, None, "the tokenizer has no BOS token")
    text = ids[:, 1:] if model.bos_id is not None else ids[:, :-1]
    with_bos = torch.cat([text.new_tensor([[bos]]), text], 1)
    loss = _cross_entropy(model, text)
    gain = loss - _cross_entropy(model, with_bos, skip=1)
    detail = f"BOS changes the cross-entropy by {-gain:+.3f} nats"
    if model.bos_id is None and gain > _BOS_GAIN:
        return Check(name, False, f"{detail}, but the tokenizer adds none; give --bos")
    if model.bos_id is not None and gain < -_BOS_GAIN:
        return Check(name, False, f"{detail}; give --no-bos")
    return Check(name, True, detail)


def _lens_checks(model: FrozenModel, folder: Path, ids: Int[Tensor, "1 seq"]) -> Iterator[Check]:
    manifest = describe_lens(folder)
    name = "the model's predictions have not changed since the lens was made"
    probe = manifest.get("probe")
    kl = None if probe is None else probe_kl(probe, model)
    is_same_body = kl is not None and kl <= probe_tolerance(manifest["probe"], model)
    if kl is None:
        yield Check(name, None, "the lens was saved without a probe")
    elif is_same_body:
        yield Check(name, True, f"KL {kl:.2g} nats")
    else:
        yield Check(
            name,
            False,
            f"they have changed (KL {kl:.3g} nats): the blocks have other weights, or another "
            "version of a library computes them differently; train the lens again",
        )
    trained_with = manifest.get("config", {}).get("corpus", {}).get("bos")
    if trained_with is not None and trained_with != (model.bos_id is not None):
        verb = "starts" if trained_with else "does not start"
        yield Check(
            "texts begin as in the lens's training",
            False,
            f"the lens was trained on text that {verb} with BOS",
        )
    name = "the lens was made for this norm and unembedding"
    try:
        lens = load_lens(folder, model, check=False)
    except InputError as error:
        detail = str(error)
        if is_same_body:
            detail += (
                "; but the predictions have not changed, so the norm or the unembedding has been "
                "folded, centred or rescaled; load the model without this"
            )
        yield Check(name, False, detail)
        return
    if "fingerprint" in manifest["model"]:
        yield Check(name, True)
    else:
        yield Check(name, None, "a lens of another library does not record this; its shapes fit")
    yield _shift(model, lens, ids)


def _shift(model: FrozenModel, lens: AffineLens, ids: Int[Tensor, "1 seq"]) -> Check:
    """Whether the translators are at the right layers and better than the logit lens."""
    name = "the lens is closer to the model than the logit lens"
    states, plain = model.residual_stream(ids), LogitLens.from_model(model)
    own, without = (kl_by_layer(one, model.unembedding, states) for one in (lens, plain))
    if not own:
        return Check(name, None, "the lens has no translator for the stream between blocks")
    for shift in (-1, 1):
        shifted = kl_by_layer(lens, model.unembedding, states, shift)
        both = own.keys() & shifted.keys()
        if sum(shifted[i] for i in both) < sum(own[i] for i in both) and len(both) > 1:
            return Check(
                name,
                False,
                f"the translator of layer l {shift:+d} fits layer l better than its own: the "
                "lens or the states are shifted by one layer",
            )
    pair = fmean(own.values()), fmean(without[layer] for layer in own)
    means = f"mean KL {pair[0]:.3g} nats, logit lens {pair[1]:.3g}"
    worse = [str(layer) for layer in own if own[layer] > without[layer]]
    if worse:
        means += f"; higher than the logit lens at layers {', '.join(worse)}"
    if pair[0] > pair[1]:
        return Check(name, False, f"{means}; train the lens again, or on text like this")
    return Check(name, True, means)


def _cross_entropy(model: FrozenModel, ids: Int[Tensor, "1 seq"], skip: int = 0) -> float:
    """Mean cross-entropy of the tokens after the first, in nats."""
    log_probs = model.model(ids, use_cache=False).logits[0, skip:-1].float().log_softmax(-1)
    return -float(log_probs.gather(-1, ids[0, skip + 1 :, None]).mean())


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = max(1e-3, 32 * torch.finfo(other.dtype).eps)
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
