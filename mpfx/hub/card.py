"""The model card of a checkpoint: how to load it, and what its run measured."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from mpfx.nn import has_masks
from mpfx.report import Report, markdown

CARD = "README.md"
"""The file of the card, where the Hugging Face Hub looks for it."""

_OURS = "<!-- Written by mpfx, which replaces this file; remove this line to keep it. -->"

_CAUSAL = "AutoModelForCausalLM"

_FILLING = (
    "Codes of weights that are left are stored under a bitmask. A GPU runs the model faster, in more memory, after "
    "`mpfx.fill_masks(model)`: as if nothing were pruned, with the same weights."
)


def model_card(folder: str | os.PathLike[str], model: nn.Module, report: Report | None = None) -> str:
    """The text of a card.

    Args:
        folder: of the checkpoint; its name is the title.
        model: one of transformers'.
        report: of the run that made it.
    """
    model_class = type(model).__name__
    name = Path(folder).absolute().name
    parts = ["\n".join(_front_matter(model_class, report)), f"# {name}"]
    parts.append(
        "A model compressed by mpfx: pruned and quantized together, every input channel with a bit width of its own. "
        "With mpfx installed, transformers loads it, from this folder or from the Hub:"
    )
    parts.append(_usage(name, model_class))
    if has_masks(model):
        parts.append(_FILLING)
    if report is not None:
        parts += ["## Figures", *_figures(report)]
    return "\n\n".join([*parts, _OURS]) + "\n"


def write_card(target: Path, folder: Path, text: str) -> None:
    """Write a card, unless the checkpoint has one that is not mpfx's.

    Args:
        target: folder to write it to.
        folder: of the checkpoint.
        text: of the card.
    """
    known = folder / CARD
    if not known.exists() or _OURS in known.read_text(encoding="utf-8", errors="replace"):
        temporary = target / f".{CARD}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target / CARD)


def _front_matter(model_class: str, report: Report | None) -> Iterator[str]:
    yield from ("---", "library_name: transformers")
    if _is_causal(model_class):
        yield "pipeline_tag: text-generation"
    yield from ("tags:", "- mpfx", "- quantized")
    if report is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", report.model) and not Path(report.model).exists():
        yield f"base_model: {report.model}"
    yield "---"


def _is_causal(model_class: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _usage(name: str, model_class: str) -> str:
    loader = _CAUSAL if _is_causal(model_class) else model_class
    return "\n".join(
        [
            "```python",
            "import mpfx.hub",
            f"from transformers import {loader}, AutoTokenizer",
            "",
            f'model = {loader}.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            "```",
        ]
    )


def _figures(report: Report) -> Iterator[str]:
    perplexity, size = report.perplexity, report.bytes
    ratios = [found["compressed"] / found["dense"] for found in (perplexity, size)]
    yield markdown(
        ["", "dense", "compressed", "ratio"],
        [
            ["perplexity", *(f"{perplexity[kind]:.3f}" for kind in ("dense", "compressed")), f"{ratios[0]:.3f}"],
            ["bytes", *(f"{size[kind]:,}" for kind in ("dense", "compressed")), f"{ratios[1]:.3f}"],
            ["stored bits per weight", "", f"{report.bits_per_weight:.3f}", ""],
            ["code bits", "", f"{report.code_bits:.3f}", ""],
            ["sparsity", "", f"{report.sparsity:.3f}", ""],
        ],
    )
    yield f"Compressed from `{report.model}`; perplexity on the run's evaluation text. `report.json` tells the rest."
    if report.notes:
        yield "\n".join(f"- {note}" for note in report.notes)
