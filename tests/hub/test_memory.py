"""Peak memory of loading and evaluating: in a process of its own, which has done the same with a tiny model before."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mpfx
from mpfx.nn import MixedPrecisionLinear, PackedWeight
from tests.hub.models import packed_linear

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks as Linux tells them")

HIDDEN, INNER, WORDS, BATCH, LENGTH = 1024, 4096, 256, 4, 64

PEAK = """
import gc, sys
import torch, mpfx, mpfx.hub
from mpfx.cli import main
from transformers import AutoModelForCausalLM

def load(folder):
    use(mpfx.load(folder))

def from_pretrained(folder):
    use(AutoModelForCausalLM.from_pretrained(folder))

def use(model):  # all pages of all weights
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8).max()

def evaluate(folder):
    data = ("--evaluation.data", sys.argv[4], "--evaluation.samples", "4")
    sizes = ("--evaluation.length", sys.argv[5], "--evaluation.batch_size", sys.argv[6])
    main(["evaluate", folder, *data, *sizes, "--trainer.accelerator", "cpu", "--json"])

def memory(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(1)
act = globals()[sys.argv[1]]
act(sys.argv[2])
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is held now
before = memory("VmRSS")
act(sys.argv[3])
print("peak", memory("VmHWM") - before)
"""


def save(folder: Path, hidden: int, inner: int, layers: int) -> None:
    """A Llama with masks in every packed layer and a tokenizer."""
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": WORDS,
    }
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=hidden // 64, tie_word_embeddings=True))
    dense = {
        "embed_tokens": torch.nn.Embedding(WORDS, hidden),
        "rotary_emb": type(model.model.rotary_emb)(model.config),
    }
    for name, module in dense.items():
        setattr(model.model, name, module)
    made: dict[tuple[int, int], PackedWeight] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            shape = (module.out_features, module.in_features)
            if shape not in made:
                made[shape] = packed_linear(*shape, bias=False).packed
            parts = {name: None if part is None else part.clone() for name, part in made[shape].parts.items()}
            model.set_submodule(path, MixedPrecisionLinear(PackedWeight.of(parts, made[shape].layout)))
        elif "norm" in path.rpartition(".")[2]:
            module.weight = torch.nn.Parameter(torch.ones(hidden))
    model.tie_weights()
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    mpfx.save(model, folder, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 MB, a tiny one, and a text."""
    base = tmp_path_factory.mktemp("memory")
    save(base / "model", HIDDEN, INNER, 16)
    save(base / "tiny", 128, 256, 1)
    (base / "text.txt").write_text(" ".join(f"w{i % WORDS}" for i in range(8 * LENGTH)))
    return base


@pytest.mark.parametrize("act", ["load", "from_pretrained", "evaluate"])
def test_packed_bytes_are_held_once(folder: Path, act: str) -> None:
    files = (str(folder / name) for name in ("tiny", "model", "text.txt"))
    result = subprocess.run(
        [sys.executable, "-c", PEAK, act, *files, str(LENGTH), str(BATCH)], capture_output=True, text=True, check=True
    )
    stored = (folder / "model" / "model.safetensors").stat().st_size
    assert stored > 90e6
    # Activations of one layer: the stream, its norm, and three of the inner size.
    activations = 0 if act != "evaluate" else 4 * BATCH * LENGTH * (2 * HIDDEN + 3 * INNER)
    assert int(result.stdout.split()[-1]) < 1.15 * (stored + activations)
