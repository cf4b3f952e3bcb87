"""Graphs of many model families, compared with what the models compute and with torch.export."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from mpfx.graph import blocks, input_groups, opaque_parts, sites, trace
from tests.zoo import FAMILIES, Sample, build

# Rounding only, relative to the largest output. Nearly all graphs are exact; where a model computes by another formula
# while it is exported (gated delta rules solve a triangular system, say), the graph holds that formula.
TOLERANCE = 1e-5

# These loop over tokens, or over chunks of them, in Python.
LOOPS = ("mamba", "mamba2", "rwkv", "bamba", "granite-hybrid", "minimax")

# Their layers write into one tensor of states, which keeps them in one block.
SHARED_STATE = ("rwkv",)


@dataclass
class Traced:
    """A model, its graph from a batch of (2, 8), and another batch with padding.

    Attributes:
        calls: Inputs of the linear layers, by path, when the model runs on ``batch``.
    """

    name: str
    model: nn.Module
    gm: fx.GraphModule
    batch: Sample
    expected: dict[str, Tensor]
    calls: dict[str, list[Tensor]]


@pytest.fixture(scope="module", params=list(FAMILIES))
def traced(request: pytest.FixtureRequest) -> Traced:
    model, sample = build(request.param)
    if request.param in LOOPS:
        model.config.use_cache = False  # type: ignore[union-attr]
    gm = trace(model, (), sample(2, 8))
    batch = sample(3, 13)
    expected, calls = run_watched(model, batch)
    return Traced(request.param, model, gm, batch, expected, calls)


@torch.no_grad()
def run_watched(model: nn.Module, batch: Sample) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Run the model, and keep the input of every module that gives the product of this input with its weight."""
    calls: dict[str, list[Tensor]] = defaultdict(list)

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if gives_product(module, args, out):
                calls[path].append(args[0])

        return hook

    handles = [m.register_forward_hook(watch(path)) for path, m in model.named_modules() if path and not m._modules]
    try:
        return tensors(model(**batch)), dict(calls)
    finally:
        for handle in handles:
            handle.remove()


def gives_product(module: nn.Module, args: tuple[Any, ...], out: Any) -> bool:
    """Whether ``out`` is ``x @ W.T + b`` or ``x @ W + b``, whatever the class of the module is called."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(out, Tensor):
        return False
    if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return False
    both = (w for w in (weight, weight.T) if w.shape == (out.shape[-1], args[0].shape[-1]))
    return any(torch.allclose(F.linear(args[0], w, bias), out, atol=1e-5) for w in both)


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """The floating-point tensors in nested results by their places; caches are left out."""
    if isinstance(value, Tensor):
        return {path: value} if value.is_floating_point() else {}
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, (list, tuple)):
        items = iter(enumerate(value))
    return {place: tensor for key, item in items for place, tensor in tensors(item, f"{path}.{key}").items()}


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The largest difference, in units of the largest value of the same tensor."""
    assert found.keys() == expected.keys() != set()
    return max(
        float((found[place] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-9))
        for place, tensor in expected.items()
    )


def leaf_name(path: str) -> str:
    return path.rpartition(".")[2]


def test_table_is_wide() -> None:
    assert len(FAMILIES) >= 34
    assert {family.kind for family in FAMILIES.values()} == {"decoder", "encoder", "pair", "image", "speech"}


def test_graph_equals_the_model(traced: Traced) -> None:
    traced.gm.graph.lint()
    with torch.no_grad():
        assert difference(traced.expected, tensors(traced.gm(**traced.batch))) <= TOLERANCE
        # The comparison means something: other inputs give clearly other outputs.
        other = {name: _shuffled(name, value) for name, value in traced.batch.items()}
        assert difference(traced.expected, tensors(traced.model(**other))) > 0.1


def _shuffled(name: str, value: Tensor) -> Tensor:
    return value if "mask" in name else value.flatten().roll(7).reshape(value.shape)


def test_blocks_one_after_the_other_equal_the_graph(traced: Traced, run_in_blocks: Any) -> None:
    parts = blocks(traced.gm)
    assert traced.name in SHARED_STATE or len(parts) >= 3  # two layers and what is around them
    assert {path for part in parts for path in part.sites} == {site.path for site in sites(traced.gm)}
    with torch.no_grad():
        result = tensors(run_in_blocks(traced.gm, **traced.batch))
        assert difference(tensors(traced.gm(**traced.batch)), result) == 0


def test_sites_are_the_linear_layers_that_run(traced: Traced) -> None:
    found = {site.path: site for site in sites(traced.gm) if site.kind != "expert"}
    assert found.keys() == traced.calls.keys()
    owners = Counter(id(p) for m in traced.model.modules() for p in m._parameters.values() if p is not None)
    for path, site in found.items():
        weight = traced.model.get_parameter(f"{path}.weight")
        assert {site.in_features, site.out_features} == set(weight.shape)
        assert traced.calls[path][0].shape[-1] == site.in_features
        assert (site.dense_reason is not None) == (owners[id(weight)] > 1)


def test_experts_are_sites_each(traced: Traced) -> None:
    found = {site.path: site for site in sites(traced.gm) if site.kind == "expert"}
    stacks = {n: p for n, p in traced.model.named_parameters() if p.dim() == 3 and "experts" in n and "bias" not in n}
    assert found.keys() == {f"{name}.{index}" for name, p in stacks.items() for index in range(p.shape[0])}
    for path, site in found.items():
        name, _, index = path.rpartition(".")
        weight = stacks[name].detach()[int(index)]
        assert site.weight(traced.model).data_ptr() == weight.data_ptr()
        assert site.weight(traced.model).shape == (site.out_features, site.in_features)
        assert sorted(weight.shape) == sorted((site.out_features, site.in_features))


def test_groups_are_the_layers_that_read_one_input(traced: Traced) -> None:
    groups = {site.path: group for group in input_groups(traced.gm) for site in group.sites if site.kind != "expert"}
    for group in groups.values():
        first, *others = ([_rows(x) for x in traced.calls[site.path]] for site in group.sites)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    readers = defaultdict(set)
    for path, group in groups.items():
        readers[tuple((id(x), x._version) for x in traced.calls[path]), group.block].add(path)
    hidden = {path for part in opaque_parts(traced.gm) for path in part.calls}
    for paths in (read - hidden for read in readers.values() if read - hidden):
        # What is handed the very same tensors stands in one group, but for what runs inside of opaque parts.
        assert len({groups[path].name for path in paths}) == 1


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def test_replaced_modules_reach_model_and_graph(traced: Traced) -> None:
    open_sites = [site for site in sites(traced.gm) if site.dense_reason is None and site.kind != "expert"]
    originals = {site.path: traced.model.get_submodule(site.path) for site in open_sites}
    try:
        for site in open_sites:
            traced.model.set_submodule(site.path, nn.Linear(site.in_features, site.out_features))
        with torch.no_grad():
            changed = tensors(traced.model(**traced.batch))
            assert difference(traced.expected, changed) > 0.01
            assert difference(changed, tensors(traced.gm(**traced.batch))) <= TOLERANCE
    finally:
        for path, module in originals.items():
            traced.model.set_submodule(path, module)


@pytest.mark.parametrize("name", LOOPS)
def test_layer_that_loops_over_the_length_is_called_as_it_is(name: str) -> None:
    model, sample = build(name)
    model.config.use_cache = False  # type: ignore[union-attr]
    gm = trace(model, (), sample(2, 8))
    assert opaque_parts(gm)
    assert all(".0." in part.path or ".1." in part.path for part in opaque_parts(gm))  # a part of one layer
    for batch in (sample(3, 5), sample(1, 16), sample(2, 27)):
        with torch.no_grad():
            assert difference(tensors(model(**batch)), tensors(gm(**batch))) <= TOLERANCE


SIBLINGS: dict[str, list[list[str]]] = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gptneox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],  # attention beside the MLP
    "cohere": [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
    "deepseek-v3": [["q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj"], ["kv_b_proj"], ["o_proj"]],
    "mixtral": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
    "bert": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    "t5": [["q", "k", "v"], ["o"], ["wi"], ["wo"]],
    "vit": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["fc1"], ["fc2"]],
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_of_a_layer(name: str) -> None:
    model, sample = build(name)
    gm = trace(model, (), sample(2, 8))
    groups = [[leaf_name(site.path) for site in group.sites] for group in input_groups(gm) if group.block == 1]
    assert groups[: len(SIBLINGS[name])] == SIBLINGS[name]


def test_cross_attention_reads_the_encoder_output() -> None:
    model, sample = build("t5")
    gm = trace(model, (), sample(2, 8))
    last = [group for group in input_groups(gm) if group.name.startswith("decoder.block.1.")]
    assert [[leaf_name(site.path) for site in group.sites] for group in last] == [
        *([["q", "k", "v"], ["o"]]),
        *([["q"], ["k", "v"], ["o"]]),  # the query comes from the decoder, key and value from the encoder
        *([["wi"], ["wo"]]),
    ]


class FirstOutput(nn.Module):
    """Calls a model with tensors by position, and gives its logits: the form that export takes."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        out = self.model(**dict(zip(self.names, values, strict=True)))
        logits: Tensor = out["logits"]
        return logits


EXPORTED = ("llama", "gpt2", "opt", "falcon", "phi3", "mixtral", "deepseek-v3", "bert", "t5", "vit")


@pytest.mark.parametrize("name", EXPORTED)
def test_export_agrees(name: str) -> None:
    model, sample = build(name)
    if FAMILIES[name].generates:
        model.config.use_cache = False  # type: ignore[union-attr]
    example, batch = sample(2, 8), sample(3, 13)
    gm = trace(model, (), example)
    program = export(model, example)
    with torch.no_grad():
        found = program.module()(*batch.values())
        assert difference({"": found}, tensors(gm(**batch)["logits"])) <= TOLERANCE
    products = weights_multiplied(program)
    ours = Counter(
        model.get_parameter(f"{node.target}.weight").data_ptr()
        for node in gm.graph.nodes
        if node.op == "call_module" and node.target in {site.path for site in sites(gm)}
    )
    assert ours == {address: products.pop(address) for address in ours}
    # What else export multiplies with belongs to modules that the graph calls as a whole, such as routers.
    whole = [model.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    assert products.keys() <= {p.data_ptr() for module in whole for p in module.parameters(recurse=False)}


def export(model: nn.Module, example: Sample) -> ExportedProgram:
    """Export with a dynamic batch, and a dynamic length where the inputs have one."""
    automatic = torch.export.Dim.AUTO
    dynamic = tuple({0: automatic, 1: automatic} if t.dim() == 2 else {0: automatic} for t in example.values())
    module = FirstOutput(model, list(example)).eval()
    return torch.export.export(module, tuple(example.values()), dynamic_shapes={"values": dynamic}, strict=False)


def weights_multiplied(program: ExportedProgram) -> Counter[int]:
    """How often each parameter is an operand of a matrix product, by its address."""
    parameters = program.graph_signature.inputs_to_parameters
    products: Counter[int] = Counter()
    for node in program.graph.nodes:
        if any(word in str(node.target) for word in ("linear", "mm", "matmul", "einsum")):
            names = {parameters.get(_source(operand).name) for operand in node.all_input_nodes}
            weights = [program.state_dict[name] for name in names if name]
            products.update(weight.data_ptr() for weight in weights if weight.dim() > 1)
    return products


def _source(node: fx.Node) -> fx.Node:
    """Go back through views and casts of one tensor."""
    moves = ("t.", "transpose", "permute", "view", "to.", "_to_copy", "numpy_T", "unsqueeze", "detach", "contiguous")
    while node.op == "call_function" and any(f"aten.{move}" in str(node.target) for move in moves):
        node = node.all_input_nodes[0]
    return node
