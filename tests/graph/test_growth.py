"""What tracing and analysing takes: twice the layers, twice the work; and no memory for weights."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from cProfile import Profile
from pathlib import Path
from pstats import Stats
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpfx
from mpfx.graph import inputs_behind, opaque_parts, permutation_folds, scale_folds, trace
from mpfx.graph.calls import tensors_in
from mpfx.passes import CompressionConfig, analysis, check_feasible, run_passes
from tests.zoo import build

SOURCE = str(Path(mpfx.__file__).parent)
WORDS = torch.arange(2 * 8).view(2, 8) + 2
INPUTS = {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS)}


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage stays where it is: its finalisers would count as calls of whoever happens to run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def work(act: Callable[[], Any]) -> Counter[str]:
    """How often every function of mpfx is called (a generator: resumed), and how many calls it makes."""
    profile = Profile()
    with no_collection():
        profile.runcall(act)
    found: Counter[str] = Counter()
    counted: Any = Stats(profile)
    for function, (_, calls, _, _, callers) in counted.stats.items():
        counts = [(function, calls), *((caller, of_caller[1]) for caller, of_caller in callers.items())]
        for (file, line, name), count in counts:
            if file.startswith(SOURCE):
                found[f"{file[len(SOURCE) :]}:{line} {name}"] += count
    return found


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that are made; what is written in place is none of these."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tensors_in(out) if not any(t is given for given in tensors_in((args, kwargs or {})))]
        self.count += sum(t.numel() for t in made)
        return out


def superlinear(work_of: Callable[[int], Counter[str]]) -> dict[str, tuple[int, ...]]:
    """Functions whose work grows more from 4 to 8 layers than twice from 2 to 4."""
    work_of(2)  # fills what is kept from one call to the next
    few, some, many = (work_of(layers) for layers in (2, 4, 8))
    assert many
    slack = 8  # a call for each layer and each before it are 12 more
    return {n: (few[n], some[n], many[n]) for n in many if many[n] - some[n] > 2 * (some[n] - few[n]) + slack}


def analysed(gm: fx.GraphModule) -> fx.GraphModule:
    gm = run_passes(gm, analysis())
    check_feasible(gm, CompressionConfig(bits_per_weight=6.0))
    inputs_behind(gm)
    permutation_folds(gm)
    scale_folds(gm)
    return gm


def picky(model: Any) -> nn.Module:
    """Every layer's MLP looks at values, so that no graph can hold it."""

    class Picky(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return x if x.abs().max() > 1e9 else super().forward(x)

    for layer in model.model.layers:
        layer.mlp.__class__ = Picky
    found: nn.Module = model
    return found


@pytest.mark.parametrize("name", ["llama", "mixtral", "picky"])
def test_work_grows_with_the_layers(name: str) -> None:
    def work_of(layers: int) -> Counter[str]:
        model, _ = build("llama" if name == "picky" else name, num_hidden_layers=layers)
        traced = picky(model) if name == "picky" else model.to("meta")
        graphs: list[fx.GraphModule] = []
        found = work(lambda: graphs.append(analysed(trace(traced, (), INPUTS))))
        assert len(opaque_parts(graphs[0])) == (layers if name == "picky" else 0)
        return found

    assert superlinear(work_of) == {}


def test_elements_grow_with_the_layers() -> None:
    def elements_of(layers: int) -> int:
        model, _ = build("llama", num_hidden_layers=layers)
        gm = trace(model.to("meta"), (), INPUTS)
        with Elements() as made:
            analysed(gm)
        return int(made.count)

    few, some, many = (elements_of(layers) for layers in (2, 4, 8))
    assert few > 10_000
    assert many - some < 2.05 * (some - few)


def test_quadratic_work_shows() -> None:
    made: dict[str, Any] = {}
    exec(compile("def pair(i, j): return i < 0", f"{SOURCE}/made_up.py", "exec"), made)

    def work_of(layers: int) -> Counter[str]:
        return work(lambda: [made["pair"](i, j) for i in range(layers) for j in range(i)])

    assert superlinear(work_of) == {"/made_up.py:1 pair": (1, 6, 28)}


def test_garbage_of_others_is_nobodys_work() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None: ...

    made: dict[str, Any] = {}
    exec(compile("def nest(n):\n  x = []\n  for _ in range(n): x = [x]", f"{SOURCE}/made_up.py", "exec"), made)
    gc.disable()
    try:
        for _ in range(100):
            Cycle()  # garbage that the next collection finalises
        gc.enable()
        found = work(lambda: made["nest"](10_000))
    finally:
        gc.enable()
    assert found == {"/made_up.py:1 nest": 1}


MEMORY = """
import torch, mpfx
from mpfx.graph import permutation_folds, scale_folds
from mpfx.passes import analysis, run_passes
from transformers import LlamaConfig, LlamaForCausalLM

def act(**sizes):
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=32000, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    gm = run_passes(mpfx.trace(model, kwargs={"input_ids": torch.zeros(2, 8, dtype=torch.long)}), analysis())
    assert len(permutation_folds(gm)) == 8 and scale_folds(gm)
    assert all(p.is_meta for p in model.parameters())
    return sum(p.nbytes for p in model.parameters())

def memory(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

act(hidden_size=64, intermediate_size=128, num_attention_heads=4)
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is held now
before = memory("VmRSS")
weights = act(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
print(weights, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks as Linux tells them")
def test_weights_are_never_allocated() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    weights, peak = map(int, run.stdout.split())
    assert weights > 2e9
    assert peak < 0.1 * weights
