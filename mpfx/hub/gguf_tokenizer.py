"""Tokenizers in GGUF: byte-level BPE, as llama, qwen, smollm and mistral have it today."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
"""llama.cpp's names for the ways to split text, by the expression that splits it."""


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int) -> None:
    """Refuse tokenizers that cannot be written.

    Raises:
        ValueError: saying what it is, and what can be written.
    """
    if tokenizer is None:
        raise ValueError(
            "Expected a tokenizer, which a GGUF file carries, but there is none: save one along with "
            "mpfx.save(model, path, tokenizer=...)."
        )
    kind = _kind(tokenizer)
    if kind != "BPE with ByteLevel":
        raise ValueError(
            f"Expected a byte-level BPE tokenizer but got {kind}: export it with `--format compressed-tensors`."
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"Expected at most {vocab_size} tokens, as the model has, but the tokenizer has {len(tokenizer)}."
        )


def _kind(tokenizer: "PreTrainedTokenizerBase") -> str:
    if not hasattr(tokenizer, "backend_tokenizer"):
        return f"{type(tokenizer).__name__}, which has no tokenizer.json"
    backend = _backend(tokenizer)
    decoder = (backend["decoder"] or {"type": "no decoder"})["type"]
    return f"{backend['model']['type']} with {decoder}"


def _backend(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def write_tokenizer(
    writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", folder: Path
) -> list[str]:
    """Add all that GGUF says of a tokenizer.

    Args:
        writer: of the file.
        tokenizer: that :func:`check_tokenizer` lets pass.
        config: of the model, which says how many tokens there are and which are special.
        folder: an empty one, for files in between.

    Returns:
        What a user should know.
    """
    import gguf

    tokenizer.save_pretrained(str(folder))
    config.save_pretrained(str(folder))
    writer.add_tokenizer_model("gpt2")
    name = split_name(_backend(tokenizer)["pre_tokenizer"])
    if name is not None:
        writer.add_tokenizer_pre(name)
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(tokenizer, n, n in by_number) for n in range(config.vocab_size)])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)
    if name is None:
        return ["llama.cpp has no name for how this tokenizer splits text, and will split it in its default way."]
    return []


def _token_type(tokenizer: Any, number: int, known: bool) -> Any:
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder.get(number)
    if added is not None:
        return TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return TokenType.NORMAL if known else TokenType.UNUSED


def split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for the way text is split before it is merged, or None for one that is not known.

    Args:
        pre_tokenizer: as ``tokenizer.json`` has it.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        return _SPLITS.get(steps[0]["pattern"].get("Regex"))
    return None
