"""`mpfx bench generate`: a language model with random weights, dense and packed, generates in the same run."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from mpfx.bench.decoding import Decoder, decode
from mpfx.bench.device import current, device_of, dtype_of, environment
from mpfx.bench.models import check_bits, config_of, packed_bits_of, random_model, stored_bytes_of
from mpfx.bench.report import place

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD = ("model", "stored bits", "weights GB", "tokens/s", "times as fast", "peak GB", "peak GB reserved")
"""Of the table."""

_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is measured.

    Args:
        model: name of a preset, a ``config.json``, or a folder that holds one.
        bits: stored bits per weight of the packed model's Linear layers, which mix 3, 4, 5 and 6 bits.
        prompt: tokens that are there before.
        tokens: that are generated.
        device: cpu, cuda or cuda:<number>; None: a CUDA device if there is one.
        dtype: of the dense model, and of all but the packed layers; None: bfloat16 on a CUDA device, float32 on the
            CPU.
        compile: whether both models run as ``torch.compile`` makes them: what lies between the Linear layers is fused.

    Raises:
        ValueError: if a field cannot be.
    """

    model: str = "llama-2-7b"
    bits: float = 4.25
    prompt: int = 32
    tokens: int = 224
    device: str | None = None
    dtype: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.prompt < 1:
            raise ValueError(f"Expected `prompt` of 1 or more but got {self.prompt}.")
        if self.tokens < 2:
            raise ValueError(f"Expected `tokens` of 2 or more but got {self.tokens}: the first one is not timed.")
        dtype_of(self.dtype, device_of(self.device))


@dataclass(frozen=True)
class Generation:
    """How one model generated.

    Attributes:
        name: dense or packed.
        bits: stored per weight of the packed layers; of a dense model of any of its weights.
        nbytes: of all its weights and buffers.
        tokens_per_second: median of the repeats, without the prompt.
        allocated: most bytes of memory in use, from before the model was made; None on the CPU.
        reserved: likewise, with what PyTorch's allocator holds back.
        tokens: that were generated.
    """

    name: str
    bits: float
    nbytes: int
    tokens_per_second: float
    allocated: int | None
    reserved: int | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class GenerateReport:
    """A dense and a packed model.

    Attributes:
        model: what both are.
        runs: dense first.
        environment: of the run.
        notes: what could not be measured: nothing.
    """

    model: str
    runs: tuple[Generation, ...]
    environment: dict[str, str | int]
    notes: tuple[str, ...] = ()

    def title(self) -> str:
        """What was measured where."""
        return f"{self.model}, random weights, {len(self.runs[0].tokens)} tokens, batch 1; {place(self.environment)}."

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table: a model each."""
        dense = self.runs[0].tokens_per_second
        return list(HEAD), [
            [
                run.name,
                f"{run.bits:.2f}",
                f"{run.nbytes / 1e9:.2f}",
                f"{run.tokens_per_second:.1f}",
                f"{run.tokens_per_second / dense:.2f}",
                *("" if peak is None else f"{peak / 1e9:.2f}" for peak in (run.allocated, run.reserved)),
            ]
            for run in self.runs
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        dense = self.runs[0].tokens_per_second
        runs = [{**asdict(run), "times_as_fast": run.tokens_per_second / dense} for run in self.runs]
        return {"model": self.model, "environment": self.environment, "runs": runs}


def bench(config: GenerateConfig, *, on_model: Callable[[str], None] = lambda text: None) -> GenerateReport:
    """Let a dense model generate, then, when it is gone, a packed one of the same sizes.

    Args:
        config: what to measure.
        on_model: called with a line about every model before it is made.

    Raises:
        ValueError: for a model that is not there, has too few positions, or cannot have such bits.
    """
    sizes = config_of(config.model)
    _check_positions(sizes, config)
    check_bits(sizes, config.bits)
    device = device_of(config.device)
    runs = []
    for name, bits in (("dense", None), ("packed", config.bits)):
        on_model(f"{config.model}, {name}")
        with current(device):
            runs.append(_generation(name, sizes, bits, config))
        gc.collect()  # models have cycles
    return GenerateReport(config.model, tuple(runs), environment(device, dtype_of(config.dtype, device)))


def _check_positions(sizes: "PretrainedConfig", config: GenerateConfig) -> None:
    most = getattr(sizes, "max_position_embeddings", None)
    if most is not None and config.prompt + config.tokens > most:
        raise ValueError(
            f"Expected `prompt` and `tokens` to be {most} together at most, as {config.model} has so many positions, "
            f"but got {config.prompt} and {config.tokens}."
        )


def _generation(name: str, sizes: "PretrainedConfig", bits: float | None, config: GenerateConfig) -> Generation:
    device = device_of(config.device)
    dtype = dtype_of(config.dtype, device)
    _forget_peak(device)
    model = random_model(sizes, device, dtype, bits=bits)
    prompt = torch.arange(config.prompt, device=device)[None] % sizes.get_text_config().vocab_size
    decoder = Decoder(model, config.prompt + config.tokens, compiled=config.compile)
    if device.type == "cuda":
        decoder.capture(prompt)
    decode(decoder, prompt, 2)  # kernels are compiled
    found = [decode(decoder, prompt, config.tokens) for _ in range(_REPEATS)]
    cuda = device.type == "cuda"
    return Generation(
        name=name,
        bits=packed_bits_of(model) or 8.0 * dtype.itemsize,
        nbytes=stored_bytes_of(model),
        tokens_per_second=(config.tokens - 1) / median(seconds for _, seconds in found),
        allocated=torch.cuda.max_memory_allocated(device) if cuda else None,
        reserved=torch.cuda.max_memory_reserved(device) if cuda else None,
        tokens=tuple(found[0][0]),
    )


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
