from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from mpfx.hub.export import export
from mpfx.hub.gguf_tokenizer import check_tokenizer, split_name
from tests.hub.exports import VOCABULARY, byte_level_tokenizer, pack_all, tiny

TEXT = "the size of 1234 models</s> é"


def test_transformers_reads_the_tokenizer_back(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["<own>"])
    export(pack_all(tiny()), tmp_path / "model.gguf", "gguf", tokenizer=tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert (loaded.bos_token, loaded.eos_token, loaded.chat_template) == ("<s>", "</s>", "{{ messages }}")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert len(kinds) == VOCABULARY
    number = tokenizer.convert_tokens_to_ids("<own>")
    assert [kinds[n] for n in (0, 1, 2, number, VOCABULARY - 1)] == [3, 3, 1, 4, 5]
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def split(pattern: str) -> dict[str, Any]:
    parts = [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "use_regex": True},
                ],
            },
            "smollm",
        ),
        (split(PRETOKENIZE_REGEX), "qwen2"),
        (split(PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")), "llama-bpe"),
        (split("other"), None),
        (None, None),
    ],
)
def test_splits_have_llama_cpps_names(pre_tokenizer: dict[str, Any] | None, name: str | None) -> None:
    assert split_name(pre_tokenizer) == name


def word_level() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize(
    ("tokenizer", "size", "message"),
    [
        (lambda: None, 300, "there is none: save one along"),
        (word_level, 300, "byte-level BPE tokenizer but got WordLevel with no decoder"),
        (byte_level_tokenizer, 200, "at most 200 tokens"),
    ],
)
def test_others_are_refused(tokenizer: Any, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tokenizer(tokenizer(), size)
