"""Texts as windows of tokens: one part calibrates, another evaluates, and no token is in both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpfx.lm.sharing import EachOnce
from mpfx.lm.text import Part, TextSource, parse_source, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STREAM_POOL = 4
"""Windows read from a stream for each window that a seeded choice keeps."""

_SEPARATOR = "\n\n"
_CHARACTERS_PER_TOKEN = 5


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The text that statistics and Hessians are taken from.

    Args:
        data: ``pydocs`` (part of Python's documentation, needs no network), a text file, a .jsonl file, or
            ``NAME[:CONFIG]:SPLIT`` of a data set (Hub or local folder); the last two with an optional ``@COLUMN``.
        samples: How many windows of tokens.
        length: Tokens in each window.
        seed: Chooses the windows among those available, without replacement; null takes the first ones.
        batch_size: Windows in each batch.
    """

    data: str = "pydocs"
    samples: int = 32
    length: int = 512
    seed: int | None = 0
    batch_size: int = 4

    def __post_init__(self) -> None:
        _check_data("calibration.data", self.data)
        _check_int("calibration.samples", self.samples, 1)
        _check_int("calibration.length", self.length, 2)
        _check_int("calibration.batch_size", self.batch_size, 1)
        if self.seed is not None:
            _check_int("calibration.seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """The text that perplexity is measured on.

    Args:
        data: As for calibration. The same file may serve both (evaluation takes its end, calibration what is
            before), the same split of a data set may not.
        samples: How many windows of tokens; null takes all, of a file that also calibrates all that calibration leaves.
        length: Tokens in each window; all but the first are predicted.
        batch_size: Windows in each batch.
    """

    data: str = "pydocs"
    samples: int | None = 16
    length: int = 512
    batch_size: int = 4

    def __post_init__(self) -> None:
        _check_data("evaluation.data", self.data)
        if self.samples is not None:
            _check_int("evaluation.samples", self.samples, 1)
        _check_int("evaluation.length", self.length, 2)
        _check_int("evaluation.batch_size", self.batch_size, 1)


class TextDataModule(LightningDataModule):
    """Windows of tokens for calibration and for evaluation.

    The documents of a text are joined by one blank line and tokenised as one text, without special tokens; the
    tokens are cut into adjacent windows, and what is left over at the end is dropped.

    - A file is read whole. Evaluation takes its *last* windows. Calibration takes the *first* ones
      (``seed=None``) or a seeded choice of all. Where both name the same file (however spelled), calibration
      sees only the tokens before the first one evaluated.
    - ``pydocs``: the topics, sorted by name, are dealt out: every fourth to evaluation, the others to
      calibration. Inside each part the rules of a file hold.
    - A split of a data set is streamed from its start, and only as far as needed: evaluation takes its first
      ``samples`` windows; calibration its first ones, or a seeded choice of the first ``4 * samples``.
      Naming the same split twice is refused.

    Batches are ``{"input_ids": (batch, length) int64}``, in the order of the text, every time the same. Several
    processes get whole batches in turn.

    Args:
        tokenizer: Of the model that will read the windows.
        calibration: What to calibrate on, or None for a data module that only evaluates.
        evaluation: What to evaluate on, or None for a data module that only calibrates.

    Raises:
        ValueError: If both are None, or both name the same split or different columns of one file.
        FileNotFoundError: If a text file does not exist.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        calibration: CalibrationData | None = None,
        evaluation: EvaluationData | None = None,
    ) -> None:
        super().__init__()
        if calibration is None and evaluation is None:
            raise ValueError("Expected `calibration`, `evaluation` or both, but got None for both.")
        self.tokenizer = tokenizer
        self.calibration = calibration
        self.evaluation = evaluation
        self._calibration_source = parse_source(calibration.data) if calibration else None
        self._evaluation_source = parse_source(evaluation.data) if evaluation else None
        self._shared_file = _is_shared_file(self._calibration_source, self._evaluation_source)
        self._calibration_windows: Tensor | None = None
        self._evaluation_windows: Tensor | None = None

    @property
    def calibration_windows(self) -> Tensor:
        """``(samples, length)`` int64, after :meth:`setup`."""
        return _ready(self._calibration_windows, "calibration")

    @property
    def evaluation_windows(self) -> Tensor:
        """``(samples, length)`` int64, after :meth:`setup`."""
        return _ready(self._evaluation_windows, "evaluation")

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the texts, once; ``stage`` makes no difference.

        Raises:
            ValueError: If a text cannot be read or is too short; the message names the field and what would fit.
            OSError: If a data set cannot be reached.
        """
        available: Tensor | None = None
        if self.evaluation and self._evaluation_source and self._evaluation_windows is None:
            tokens = self._evaluation_tokens(self.evaluation, self._evaluation_source)
            reserved = 0
            if self._shared_file and self.calibration:
                reserved = self.calibration.samples * self.calibration.length
            self._evaluation_windows, rest = _last_windows(tokens, self.evaluation, reserved)
            available = rest if self._shared_file else None
        if self.calibration and self._calibration_source and self._calibration_windows is None:
            if available is None:
                available = self._calibration_tokens(self.calibration, self._calibration_source)
            self._calibration_windows = _choose_windows(available, self.calibration, self._shared_file)

    def calibration_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the calibration batches."""
        windows = self.calibration_windows
        assert self.calibration is not None
        return _loader(windows, self.calibration.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the evaluation batches."""
        windows = self.evaluation_windows
        assert self.evaluation is not None
        return _loader(windows, self.evaluation.batch_size)

    def _evaluation_tokens(self, config: EvaluationData, source: TextSource) -> Tensor:
        enough = None if config.samples is None else config.samples * config.length
        return _read_tokens(self.tokenizer, source, "evaluation", enough)

    def _calibration_tokens(self, config: CalibrationData, source: TextSource) -> Tensor:
        pool = 1 if config.seed is None else STREAM_POOL
        return _read_tokens(self.tokenizer, source, "calibration", pool * config.samples * config.length)


class _Windows(Dataset[dict[str, Tensor]]):
    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


def _loader(windows: Tensor, batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """Batch in fixed order; its own generator keeps DataLoader from drawing from the global one."""
    data = _Windows(windows)
    sampler = EachOnce(data, batch_size)
    return DataLoader(data, batch_size, sampler=sampler, generator=torch.Generator().manual_seed(0))


def _read_tokens(tokenizer: PreTrainedTokenizerBase, source: TextSource, part: Part, enough: int | None) -> Tensor:
    """Tokenise a text: whole, or a stream's first ``enough`` tokens (fewer if it is shorter).

    Returns:
        ``(tokens,)`` int64.
    """
    documents = read_documents(source, part)
    if source.kind != "dataset" or enough is None:
        return _tokenise(tokenizer, list(documents))
    texts: list[str] = []
    characters = enough * _CHARACTERS_PER_TOKEN
    while True:
        exhausted = not _extend(texts, documents, characters)
        tokens = _tokenise(tokenizer, texts)
        if exhausted or len(tokens) >= enough:
            return tokens[:enough]
        characters = max(1, sum(map(len, texts)) * (enough - len(tokens)) // max(1, len(tokens)))


def _extend(texts: list[str], documents: Iterator[str], characters: int) -> bool:
    """Append documents of at least so many characters; tell whether there were enough."""
    for text in documents:
        texts.append(text)
        characters -= len(text) + len(_SEPARATOR)
        if characters <= 0:
            return True
    return False


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Tokenise documents as one text; ``verbose`` off: a text longer than the model's context is meant."""
    encoding = tokenizer(_SEPARATOR.join(texts), add_special_tokens=False, verbose=False)
    return torch.tensor(encoding["input_ids"], dtype=torch.long)


def _cut(tokens: Tensor, length: int) -> Tensor:
    """Cut ``(tokens,)`` into adjacent windows ``(tokens // length, length)``."""
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def _last_windows(tokens: Tensor, config: EvaluationData, reserved: int) -> tuple[Tensor, Tensor]:
    """Return the last windows (or all but for so many tokens at the start), and the tokens before them."""
    windows = _cut(tokens, config.length)
    samples = config.samples
    if samples is None:
        samples = max(0, (windows.numel() - reserved) // config.length)
    if not 1 <= samples <= len(windows):
        taken = reserved if config.samples is None else 0
        after = " after the windows of the same file that calibration takes" if taken else ""
        raise _too_short("evaluation", config, max(0, len(tokens) - taken), after)
    first = len(windows) - samples
    return windows[first:], tokens[: first * config.length]


def _choose_windows(tokens: Tensor, config: CalibrationData, shared: bool) -> Tensor:
    """Return the first windows, or a seeded choice of them in the order of the text."""
    windows = _cut(tokens, config.length)
    if config.samples > len(windows):
        before = " before the windows of the same file that evaluation takes" if shared else ""
        raise _too_short("calibration", config, len(tokens), before)
    if config.seed is None:
        return windows[: config.samples]
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(windows), generator=generator)[: config.samples]
    return windows[chosen.sort().values]


def _too_short(part: Part, config: CalibrationData | EvaluationData, tokens: int, where: str) -> ValueError:
    fitting = tokens // config.length
    asked = "at least 1 window" if config.samples is None else f"{config.samples} windows"
    remedy = f"lower {part}.samples to at most {fitting}" if fitting else f"lower {part}.length to at most {tokens}"
    if where:
        remedy += f", lower {'calibration' if part == 'evaluation' else 'evaluation'}.samples"
    return ValueError(
        f"{part}.samples: asked for {asked} of {config.length} tokens, but {part}.data = {config.data!r} holds "
        f"{tokens} tokens{where}, which is {fitting} windows. Name a longer text in {part}.data, or {remedy}."
    )


def _is_shared_file(calibration: TextSource | None, evaluation: TextSource | None) -> bool:
    """Tell whether one file serves both parts; refuse what cannot be kept apart."""
    if not calibration or not evaluation or calibration.kind == "pydocs" or not calibration.same_text(evaluation):
        return False
    if calibration.kind == "dataset":
        other = "validation" if calibration.split == "train" else "train"
        raise ValueError(
            f"calibration.data and evaluation.data are the same split of one data set ({evaluation.spec!r}): "
            f"what calibrates must not evaluate. Name another split in calibration.data, for example {other!r}."
        )
    if (calibration.kind, calibration.column) != (evaluation.kind, evaluation.column):
        raise ValueError(
            f"calibration.data and evaluation.data read different parts of one file ({calibration.spec!r} and "
            f"{evaluation.spec!r}), which cannot be kept apart. Name the same file and column, or two files."
        )
    return True


def _ready(windows: Tensor | None, part: Part) -> Tensor:
    if windows is None:
        raise RuntimeError(
            f"There are no {part} windows: call `setup()` first, on a TextDataModule made with `{part}=...`."
        )
    return windows


def _check_int(field: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**63:
        raise ValueError(f"Expected `{field}` to be an integer of at least {minimum} but got {value!r}.")


def _check_data(field: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"Expected `{field}` to name a text, such as 'pydocs', but got {value!r}.")
