"""Loads a model from a folder, the hub or the package."""

import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast, get_args

import torch
import transformers

from tunedlens import builtin
from tunedlens.config import Dtype, ModelConfig
from tunedlens.errors import InputError, first_line
from tunedlens.hub import hub_or_cache
from tunedlens.model.frozen import FrozenModel
from tunedlens.model.fsdp import division
from tunedlens.model.quantised import is_quantised
from tunedlens.model.shape import ModelShape, shape_without_weights
from tunedlens.model.structure import find_parts

DeviceMap = str | dict[str, int | str | torch.device]


def load_model(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    fsdp: bool = False,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    final_norm: str | None = None,
    check: bool = True,
) -> FrozenModel:
    """Load a causal language model.

    Args:
        model: hub name or folder; by default `embedded`, the GPT-2 of this package.
        revision: branch, tag or commit on the hub.
        dtype: float32, bfloat16 or float16; weights in another dtype are converted.
        device: by default the accelerator if there is one, otherwise the CPU.
        device_map: how transformers spreads the model over several devices, instead of `device`:
            `auto`, or the device of every module by name. Lenses are on the device of the
            unembedding.
        fsdp: whether to divide the weights among the processes, which then all run the model.
        adapter: folder or hub name of a PEFT adapter, which is merged into the model.
        gguf_file: the name of a GGUF file with the weights, in the folder or on the hub.
        trust_remote_code: whether to run code from the model's repository. If not, a model that
            needs such code is refused.
        blocks: see `FrozenModel`; only for a model whose structure is not recognised.
        final_norm: see `FrozenModel`.
        check: see `FrozenModel`.

    Raises:
        InputError: the model does not exist, is damaged or is not supported, the hub cannot
            be reached, or the device cannot be used.
    """
    name = builtin.NAME if model is None else str(model)
    source = _model_source(name, gguf_file)
    weights_dtype, options = _load_dtype(dtype), _options(revision, trust_remote_code, gguf_file)
    if fsdp:
        _require_alone(device, device_map, dtype, adapter)
        skeleton = _without_weights(name, source, options)
        placement = division(skeleton, find_parts(skeleton, blocks, final_norm), name)
    else:
        placement = {"device_map": _placement(device, device_map, dtype)}
    tokenizer, loaded = _load(name, source, options, placement | {"dtype": weights_dtype})
    if adapter is not None:
        loaded = _with_adapter(loaded, name, str(adapter))
        name = f"{name} + {adapter}"
    fingerprint = None
    if dtype == "float16":
        _require_plain(loaded, name, "--dtype float16")
        exact = FrozenModel(loaded, tokenizer, blocks=blocks, final_norm=final_norm, check=False)
        fingerprint = exact.identity.fingerprint
        loaded = loaded.half()
    return FrozenModel(
        loaded, tokenizer, name, fingerprint, blocks=blocks, final_norm=final_norm, check=check
    )


def load_configured(
    config: ModelConfig, device: torch.device | None, *, check: bool = True
) -> FrozenModel:
    """Load the model of a config; `device` is the default if the config names none."""
    return load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device or (device if config.device_map is None else None),
        device_map=config.device_map,
        fsdp=config.fsdp,
        adapter=config.adapter,
        gguf_file=config.gguf_file,
        trust_remote_code=config.trust_remote_code,
        blocks=config.blocks,
        final_norm=config.final_norm,
        check=check,
    )


def load_shape(config: ModelConfig) -> ModelShape:
    """The shape of a model, from its configuration file alone.

    The weights of a quantised model are counted as if they were not quantised.

    Raises:
        InputError: there is no such configuration, or the model is not supported.
    """
    name = builtin.NAME if config.model is None else config.model
    options = _options(config.revision, config.trust_remote_code, config.gguf_file)
    model = _without_weights(name, _model_source(name, config.gguf_file), options)
    return shape_without_weights(name, model, config.blocks, config.final_norm)


def _options(
    revision: str | None, trust_remote_code: bool, gguf_file: str | None
) -> dict[str, object]:
    """What transformers is told to find a model."""
    options: dict[str, object] = {"revision": revision, "trust_remote_code": trust_remote_code}
    return options | ({} if gguf_file is None else {"gguf_file": gguf_file})


def _without_weights(
    name: str, source: str, options: Mapping[str, object]
) -> transformers.PreTrainedModel:
    """The model on the meta device.

    Raises:
        InputError: there is no configuration of a causal language model.
    """
    try:
        with _reaching(source):
            config = transformers.AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            trusted = options["trust_remote_code"]
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except Exception as error:  # transformers raises many kinds of exception
        raise InputError(f"cannot read the model {name}: {_reason(error)}") from error


def _require_alone(
    device: str | torch.device | None,
    device_map: DeviceMap | None,
    dtype: str,
    adapter: str | Path | None,
) -> None:
    """Check that nothing is given that excludes FSDP."""
    others = {
        f"--device {device}": _usable_device(device).type != _usable_device(None).type,
        "--device-map": device_map is not None,
        "--dtype float16": dtype == "float16",
        "--adapter": adapter is not None,
    }
    for other, is_given in others.items():
        if is_given:
            raise InputError(f"--fsdp does not work with {other}; leave one of them out")


def _reaching(source: str) -> AbstractContextManager[None]:
    """Reads a name on the hub from there or from the cache."""
    return nullcontext() if Path(source).is_dir() else hub_or_cache()


def _load(
    name: str, source: str, options: Mapping[str, object], of_weights: Mapping[str, object]
) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel]:
    """A tokenizer and its model.

    Raises:
        InputError: they do not exist, are damaged, or cannot be loaded in this way.
    """
    try:
        with _reaching(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            return tokenizer, _with_all_weights(source, {**options, **of_weights})
    except Exception as error:  # transformers raises many kinds of exception
        raise InputError(f"cannot load the model {name}: {_reason(error)}") from error


def _with_all_weights(source: str, options: Mapping[str, object]) -> transformers.PreTrainedModel:
    """The model, whose file has every weight."""
    result: object = transformers.AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, **options
    )
    loaded, info = cast("tuple[transformers.PreTrainedModel, dict[str, set[str]]]", result)
    if missing := sorted(info["missing_keys"])[:3]:
        raise ValueError(f"the weights {', '.join(missing)} are missing")
    return loaded


def _load_dtype(name: str) -> torch.dtype:
    """The dtype that weights are loaded in, on the way to the one that is named.

    Raises:
        InputError: there is no such dtype.
    """
    if name not in get_args(Dtype):
        raise InputError(f"dtype must be one of {', '.join(get_args(Dtype))}; got {name!r}")
    # Only float32 and bfloat16 keep the fingerprint, so float16 is reached by way of float32.
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _reason(error: Exception) -> str:
    """Why transformers cannot load a model."""
    reason = first_line(error)
    if isinstance(error, InputError):  # the hub cannot be reached
        return f"there is no such folder, and {reason}"
    if "trust_remote_code" in str(error):
        return "it brings code of its own; to run that code, give --trust-remote-code"
    if unknown := re.match(r"Unrecognized configuration class <class '.*?(\w+)'>", reason):
        return f"transformers has no causal language model with a {unknown[1]}"
    return reason


def _with_adapter(
    model: transformers.PreTrainedModel, name: str, adapter: str
) -> transformers.PreTrainedModel:
    """The model with a PEFT adapter merged into its weights.

    Raises:
        InputError: peft is not installed, there is no such adapter for this model, or the model
            is quantised.
    """
    _require_plain(model, name, "--adapter")
    try:
        import peft
    except ImportError as error:
        raise InputError("--adapter needs peft; install it with: pip install peft") from error
    folder = Path(adapter).expanduser()
    expected = ("adapter_config.json", "adapter_model.safetensors")
    if folder.is_dir() or adapter.startswith((".", "/", "~")):
        if not all((folder / file).is_file() for file in expected):
            raise InputError(f"{adapter} is not a PEFT adapter: expected {' and '.join(expected)}")
        adapter = str(folder)
    try:
        with _reaching(adapter), warnings.catch_warnings():
            # peft warns of weights that it does not find, and leaves them out.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            with_adapter = peft.PeftModel.from_pretrained(model, adapter)
        saved = peft.utils.load_peft_weights(adapter, device="cpu").keys()
        if unused := saved - peft.get_peft_model_state_dict(with_adapter).keys():
            raise ValueError(f"the model has no place for {min(unused)}")
        return cast("transformers.PreTrainedModel", with_adapter.merge_and_unload())
    except Exception as error:  # peft raises many kinds of exception
        raise InputError(
            f"cannot load the adapter {adapter} on {name}: {first_line(error)}"
        ) from error


def _require_plain(model: transformers.PreTrainedModel, name: str, option: str) -> None:
    if is_quantised(model):
        raise InputError(f"{name} is quantised, and {option} changes weights; leave it out")


def _model_source(name: str, gguf_file: str | None = None) -> str:
    """The folder or the hub name that transformers loads.

    Raises:
        InputError: the name is a path where there is no model.
    """
    if name == builtin.NAME:
        return str(builtin.FOLDER)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            if (path / (gguf_file or "config.json")).is_file():
                return str(path)
            raise InputError(
                f"{name} is not a model: expected a Hugging Face folder with "
                f"{gguf_file or 'config.json, model.safetensors and tokenizer files'}"
            )
        if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"{name}: expected a folder with a model or a name on the hub")
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name}: cannot look for a model: {first_line(error)}") from error
    return name


def _placement(
    device: str | torch.device | None, device_map: DeviceMap | None, dtype: str
) -> DeviceMap:
    """The device map that transformers takes.

    Raises:
        InputError: torch cannot use the device, or a device map is given with what excludes it.
    """
    if device_map is None:
        return {"": _usable_device(device)}
    if device is not None or dtype == "float16":
        other = "--dtype float16" if device is None else "--device"
        raise InputError(f"--device-map does not work with {other}; leave one of them out")
    return device_map


def _usable_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the accelerator if there is one, or the CPU.

    Raises:
        InputError: torch cannot use the device.
    """
    try:
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use the device {device}: {first_line(error)}") from error
    return target
