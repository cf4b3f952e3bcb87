"""Modules that do what a graph cannot hold, or hardly: each works on other batches, or says what to change."""

from __future__ import annotations

import copy
import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpfx.graph import TraceError, bind_inputs, blocks, sites, trace
from mpfx.graph.live import opaque_parts
from mpfx.nn import Layout, MixedPrecisionLinear, pack
from mpfx.solve import GridConfig, Sparsity, sweep

Body = Callable[[Any, Tensor], Any]
WIDTH = 8


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


class Layer(nn.Module):
    """Runs ``body(self, x)``."""

    def __init__(self, body: Body, **children: nn.Module) -> None:
        super().__init__()
        self.mlp, self.lin, self.body = Mlp(), nn.Linear(WIDTH, WIDTH), body
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Leaf(nn.Module):
    """A module without children."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Net(nn.Module):
    """Layers with residuals; reads sizes of values, so that the graph computes with these."""

    def __init__(self, body: Body, layers: int = 2) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(Layer(body) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for layer in self.layers:
            h = h + layer(h)
        y: Tensor = self.out(h.view(h.shape[0] * h.shape[1], -1)).view(h.shape[0], h.shape[1], 4)
        return y


def plain(self: Any, x: Tensor) -> Any:
    return self.mlp(x) + self.lin(x)


def branch(self: Any, x: Tensor) -> Any:
    y = self.mlp(x)
    return y if x.sum() > 0 else 2 * self.lin(y)


def early_exit(self: Any, x: Tensor) -> Any:
    for _ in range(3):
        x = self.lin(x)
        if x.abs().max() < 0.1:
            break
    return x


def rows(self: Any, x: Tensor) -> Any:
    out = torch.ones_like(x)
    for i in range(x.shape[0]):
        if x[i].sum() > 0:
            out[i] = self.mlp(x[i])
    return out


def with_numpy(self: Any, x: Tensor) -> Any:
    return self.mlp(torch.from_numpy(x.detach().numpy() * 2))


def with_list(self: Any, x: Tensor) -> Any:
    return self.mlp(x) * max(x.flatten().tolist())


def with_data(self: Any, x: Tensor) -> Any:
    y = self.lin(x)
    y.data = self.mlp(y)
    return y


def with_autocast(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.mlp(x)
    return y.float() + self.lin(x)


def with_vmap(self: Any, x: Tensor) -> Any:
    return torch.vmap(self.mlp)(x) + self.lin(x)


def with_grad(self: Any, x: Tensor) -> Any:
    return self.lin(torch.func.grad(lambda v: self.mlp(v).square().sum())(x))


def caught(self: Any, x: Tensor) -> Any:
    try:
        return self.mlp(x) if float(x.sum()) > 0 else self.lin(x)
    except Exception:
        return 7 * x


def caught_numpy(self: Any, x: Tensor) -> Any:
    try:
        x.detach().numpy()
    except Exception:
        return 7 * x
    return self.mlp(x)


def random_branch(self: Any, x: Tensor) -> Any:
    return self.mlp(x) if torch.rand(()) < 2 else x


def in_place(self: Any, x: Tensor) -> Any:
    y = self.mlp(x)
    x += y if y.sum() > -1e9 else 1
    return 2 * x


def another_view(self: Any, x: Tensor) -> Any:
    return self.lin(x).transpose(1, 2).contiguous().transpose(1, 2) if x.sum() < 1e9 else x


FALLS_BACK: dict[str, Body] = {
    "branch": branch,
    "early exit": early_exit,
    "rows": rows,
    "numpy": with_numpy,
    "list": with_list,
    "data": with_data,
    "autocast": with_autocast,
    "vmap": with_vmap,
    "grad": with_grad,
    "caught": caught,
    "caught numpy": caught_numpy,
    "random branch": random_branch,
    "in place": in_place,
    "another view": another_view,
}


def batches() -> Iterator[Tensor]:
    """Other batch and length than traced, of several signs."""
    for batch, length, shift in [(3, 7, 1.0), (3, 7, -1.0), (5, 2, 0.0)]:
        yield torch.randn(batch, length, WIDTH) + shift


def example() -> Tensor:
    return torch.randn(2, 5, WIDTH)


def compare(module: nn.Module, gm: Any) -> None:
    for x in batches():
        with torch.no_grad():
            expected, found = module(x.clone()), gm(x.clone())
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.abs().max() > 1e-3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("body", FALLS_BACK.values(), ids=FALLS_BACK)
def test_layer_that_cannot_be_recorded_is_called_as_it_is(body: Body, run_in_blocks: Any) -> None:
    module = Net(body).eval()
    gm = trace(module, (example(),))
    compare(module, gm)
    paths = [site.path for site in sites(gm)]
    assert (paths[0], paths[-1]) == ("inp", "out")
    assert paths[1:-1] == [path for part in opaque_parts(gm) for path in part.calls]
    assert [part.path for part in opaque_parts(gm)] == ["layers.0", "layers.1"]
    assert all("test_hostile.py:" in part.where for part in opaque_parts(gm))
    x = torch.randn(4, 3, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(run_in_blocks(gm, x.clone()), module(x.clone()))


@pytest.mark.parametrize("body", FALLS_BACK.values(), ids=FALLS_BACK)
def test_root_that_cannot_be_recorded_is_called_as_it_is(body: Body, run_in_blocks: Any) -> None:
    module = Layer(body).eval()
    gm = trace(module, (example(),))
    compare(module, gm)
    assert [part.path for part in opaque_parts(gm)] == [""]
    assert opaque_parts(gm)[0].calls[0] in ("mlp.a", "lin")
    x = torch.randn(4, 3, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(run_in_blocks(gm, x.clone()), module(x.clone()))
    with pytest.raises(TraceError, match=r"the traced module \(Layer\) at .*test_hostile.py:\d+: .*What to change: "):
        trace(module, (example(),), whole=True)


def test_data_dependent_leaf_is_a_leaf_all_the_same() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), Leaf(lambda _, x: x * 2 if x.sum() > 0 else x - 1), Mlp())
    gm = trace(module, (example(),))
    compare(module, gm)
    assert opaque_parts(gm) == ()
    assert len(sites(gm)) == 3
    with pytest.raises(TraceError, match=r"`1` \(Leaf\)"):
        trace(module, (example(),), whole=True)


class Counting(nn.Module):
    """Counts in a buffer, a number, a list and a dict; the result shows the buffer."""

    count: Tensor

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.mlp, self.calls, self.limit = Mlp(), 0, limit
        self.seen: list[Any] = []
        self.cache: dict[str, Any] = {}
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        self.seen.append(x)
        self.cache[str(self.calls)] = x
        if self.limit is not None and self.count.item() > self.limit:
            x = -x
        y: Tensor = self.mlp(x) + self.count
        return y


@pytest.mark.parametrize("limit", [None, 3.0])
def test_side_effects(limit: float | None) -> None:
    module = nn.Sequential(Counting(limit), nn.Linear(WIDTH, WIDTH))
    counting = module[0]
    assert isinstance(counting, Counting)
    gm = trace(module, (example(),))
    assert (counting.count.item(), counting.calls, counting.seen, counting.cache) == (0, 0, [], {})
    for calls in range(1, 6):
        twin = copy.deepcopy(module)
        x = torch.randn(3, 4, WIDTH)
        torch.testing.assert_close(gm(input=x), twin(x))
        assert counting.count == calls


def test_random_numbers() -> None:
    module = Net(lambda self, x: self.mlp(x) * torch.rand_like(x) + nn.functional.dropout(x, 0.5))
    gm, x = trace(module, (example(),)), torch.randn(3, 4, WIDTH)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    assert torch.equal(gm(x=x), expected)


# Hooks


def pre_hook_for(kind: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if kind == "changes":
            return (2 * args[0],), kwargs
        if kind == "looks":
            vars(module)["looked"] = args[0].shape
        elif args[0].sum() > 0:  # decides on values
            return (2 * args[0],), kwargs
        return None

    return hook


def hook_for(kind: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Any:
        if kind == "changes":
            return 3 * out
        if kind == "looks":
            vars(module)["looked"] = out.shape
        elif out.sum() > 0:  # decides on values
            return 3 * out
        return None

    return hook


@pytest.mark.parametrize("kind", ["changes", "looks", "decides"])
@pytest.mark.parametrize("where", ["", "layers.0", "layers.0.mlp", "layers.0.mlp.a", "inp"])
def test_hooks_of_the_user(where: str, kind: str) -> None:
    module = Net(plain).eval()
    target = module.get_submodule(where)
    target.register_forward_pre_hook(pre_hook_for(kind), with_kwargs=True)
    target.register_forward_hook(hook_for(kind), with_kwargs=True)
    hooks = dict(target._forward_hooks), dict(target._forward_pre_hooks)
    gm = trace(module, (example(),))
    assert (target._forward_hooks, target._forward_pre_hooks) == hooks
    compare(module, gm)


# Compiled code, wrappers, other kinds of modules


def compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


@pytest.mark.parametrize("kind", ["root", "child", "in place", "layer in place"])
def test_compiled_modules(kind: str) -> None:
    plain_net = Net(plain).eval()
    module: nn.Module = plain_net
    if kind == "root":
        module = compiled(plain_net)
    elif kind == "child":
        module = nn.Sequential(compiled(plain_net), nn.Linear(4, 4))
    elif kind == "in place":
        module.compile(backend="eager")
    else:
        plain_net.layers[0].compile(backend="eager")
    gm = trace(module, (example(),))
    assert len(sites(gm)) == (9 if kind == "child" else 8)
    twin = Net(plain).eval()
    twin.load_state_dict(plain_net.state_dict())
    for x in batches():  # against code that is not compiled, as compiling takes long
        found = gm(x)
        expected = module[1](twin(x)) if isinstance(module, nn.Sequential) else twin(x)
        torch.testing.assert_close(found, expected)


class Int8(nn.Module):
    weight: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(WIDTH, 1) / 100)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale)


def dynamic_quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(Net(plain).eval(), {nn.Linear})
    return quantized


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(Mlp()), nn.Linear(WIDTH, WIDTH))


def jit_traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.trace(Mlp(), example()), nn.Linear(WIDTH, WIDTH))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x + x.detach().exp()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 2


def doubled(self: Any, x: Tensor) -> Any:
    return Doubled.apply(self.mlp(x))  # type: ignore[no-untyped-call]


@dataclasses.dataclass
class Wrapped:
    x: Tensor


def encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


class Holds(Net):
    """Has tensors in plain attributes, lists and dicts."""

    def __init__(self) -> None:
        super().__init__(lambda layer, x: layer.mlp(x) + self.held * self.parts[0] + self.named["k"])
        self.held, self.parts, self.named = torch.randn(WIDTH), [torch.randn(WIDTH)], {"k": torch.randn(WIDTH)}


def lazy_buffer(self: Any, x: Tensor) -> Any:
    if getattr(self, "positions", None) is None or self.positions.shape[0] != x.shape[1]:
        self.register_buffer("positions", torch.arange(x.shape[1]).float()[:, None], persistent=False)
    return self.mlp(x) + self.positions


WORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # with the numbers of sites and of opaque parts
    "DataParallel": (lambda: nn.DataParallel(Net(plain)), 8, 0),
    "checkpoint": (lambda: Net(lambda s, x: checkpoint(s.mlp, x, use_reentrant=False)), 6, 0),
    "encoder": (encoder, 4, 0),
    "encoder, length first": (lambda: encoder(False), 4, 0),
    "attention": (lambda: Layer(lambda s, x: s.m(s.lin(x), x, x)[0], m=nn.MultiheadAttention(8, 2)).eval(), 1, 0),
    "lstm": (lambda: Layer(lambda s, x: s.lin(s.m(x)[0]), m=nn.LSTM(WIDTH, WIDTH, batch_first=True)), 1, 0),
    "gru": (lambda: Layer(lambda s, x: s.lin(s.m(x)[0]), m=nn.GRU(WIDTH, WIDTH, 2)), 1, 0),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), Mlp()), 3, 0),
    "spectral norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))).eval(), 1, 0),
    "old weight norm": (old_weight_norm, 2, 0),
    "int8 weights": (lambda: nn.Sequential(Int8(), nn.Linear(WIDTH, WIDTH)), 1, 0),
    "dynamic quantized": (dynamic_quantized, 0, 8),
    "TorchScript": (scripted, 1, 1),
    "traced by TorchScript": (jit_traced, 1, 1),
    "autograd function": (lambda: Net(doubled), 6, 0),
    "einsum": (lambda: Net(lambda s, x: torch.einsum("btc,dc->btd", s.mlp(x), s.lin.weight)), 6, 0),
    "in place on the input": (lambda: Net(lambda s, x: s.mlp(x.mul_(2))), 6, 0),
    "tensors in attributes": (Holds, 6, 0),
    "lazy buffer": (lambda: Net(lazy_buffer), 6, 0),
    "dataclass between": (lambda: Layer(lambda s, x: s.m(x).x, m=Layer(lambda s, x: Wrapped(s.mlp(x)))), 2, 0),
    "generator between": (
        lambda: Layer(
            lambda s, x: sum(s.m(x)), m=Layer(lambda s, x: (f(x) for f in s.mlp.children() if f.in_features == WIDTH))
        ),
        1,
        0,
    ),
    "python's random": (lambda: Net(lambda s, x: s.mlp(x) if random.random() < 2 else x), 6, 0),
    "tuple with a flag": (lambda: Layer(lambda s, x: s.lin(s.m(x)[0]), m=Layer(lambda s, x: (s.mlp(x), True))), 3, 0),
}


@pytest.mark.parametrize(("make", "linears", "parts"), WORKS.values(), ids=WORKS)
def test_odd_modules(make: Callable[[], nn.Module], linears: int, parts: int) -> None:
    module = make()
    gm = trace(module, (example(),))
    assert (len(sites(gm)), len(opaque_parts(gm))) == (linears, parts)
    compare(module, gm)


def test_direct_reads_of_a_weight_make_the_layer_dense() -> None:
    def reads(self: Any, x: Tensor) -> Any:
        return nn.functional.linear(self.mlp(x), self.lin.weight) + (self.lin(x) if self.decides and x.sum() > 0 else 0)

    for decides in (False, True):
        module = Layer(lambda s, x: s.lin(s.m(x)), m=Layer(reads))
        vars(module.m)["decides"] = decides
        gm = trace(module, (example(),))
        linears = gm.meta["mpfx"].linears
        assert "read directly" in str(linears["m.lin"].dense_reason)
        assert linears["m.mlp.a"].dense_reason is linears["lin"].dense_reason is None
        assert len(opaque_parts(gm)) == decides
        compare(module, gm)


def test_packed_linear() -> None:
    layout, one = Layout(WIDTH, (8,), 64), torch.randn(WIDTH, WIDTH)
    weight = pack(sweep(one, torch.eye(WIDTH), layout, GridConfig(), Sparsity.parse(None)))
    module = nn.Sequential(MixedPrecisionLinear(weight), Mlp())
    gm = trace(module, (example(),))
    assert [site.path for site in sites(gm)] == ["1.a", "1.b"]
    assert [node.target for node in gm.graph.find_nodes(op="call_module")] == ["0", "1.a", "1.b"]
    compare(module, gm)


def test_loop_over_the_batch_in_an_opaque_part_stays_dynamic() -> None:
    def stacked(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.stack([self.mlp(row) for row in x]).float()

    module = Net(stacked)
    gm = trace(module, (example(),))
    compare(module, gm)


def test_loop_over_the_batch_leaves_it_dynamic() -> None:
    module = Net(lambda s, x: torch.stack([s.mlp(row) for row in x]))
    gm = trace(module, (torch.randn(4, 5, WIDTH),))
    assert [part.path for part in opaque_parts(gm)] == ["layers.0", "layers.1"]
    compare(module, gm)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (lambda s, x: None, "returns no tensor.*trace a module that returns tensors"),
        (lambda s, x: (s.lin(x) for _ in range(2)), "returns no tensor"),
        (lambda s, x: x.tolist(), "returns no tensor|values of a tensor"),
        (lambda s, x: s.lin(x[..., :3]), r"test_hostile.py:\d+: RuntimeError.*works without tracing"),
    ],
)
def test_modules_without_result_are_refused(body: Body, problem: str) -> None:
    with pytest.raises(TraceError, match=problem):
        trace(Layer(body), (example(),))


def test_module_that_needs_a_trainer() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Attached(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Any:
            return self.lin(x) * self.trainer.world_size

    with pytest.raises(TraceError, match=r"Attached\) at .*:\d+: RuntimeError: .*not attached to a `Trainer`"):
        trace(Attached(), (example(),))


def test_script_root_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(Mlp())
    with pytest.raises(TraceError, match=r"TorchScript module.*What to change"):
        trace(module, (example(),))


def test_models_on_meta() -> None:
    with torch.device("meta"):
        fits, branches = Net(with_autocast), Net(branch)
    gm = trace(fits, (example(),))
    assert [part.path for part in opaque_parts(gm)] == ["layers.0", "layers.1"]
    fits.to_empty(device="cpu")
    for parameter in fits.parameters():
        nn.init.normal_(parameter, std=0.3)
    compare(fits, gm)
    with pytest.raises(TraceError, match=r"`layers.0` .*test_hostile.py:\d+: .*load the weights before the trace"):
        trace(branches, (example(),))


def test_copy_of_the_model_after_the_trace() -> None:
    for body in (plain, branch):
        module = Net(body).eval()
        gm, x = trace(module, (example(),)), torch.randn(3, 4, WIDTH)
        twin = copy.deepcopy(module)
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(gm(x), module(x))
        assert not twin(x).any()


def test_gradient_checkpointing_of_a_language_model(family: Any) -> None:
    model, sample = family("llama")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # by version
    enable()
    model.train()
    batch = sample(3, 9) | {"use_cache": False}
    gm = trace(model, (), sample(2, 7) | {"use_cache": False})
    assert len(sites(gm)) == 15
    assert opaque_parts(gm) == ()
    assert torch.allclose(gm(**batch)["logits"], model(**batch).logits, atol=1e-5)


def test_blocks_of_a_model_with_opaque_layers() -> None:
    gm = trace(Net(branch), (example(),))
    assert [block.name for block in blocks(gm)] == ["prefix", "layers.0", "layers.1", "suffix"]
    assert bind_inputs(gm, (example(),)).keys() == {"x"}


# Parameters that a forward writes to, and random numbers that it keeps


class Rescales(nn.Module):
    """Changes a weight in its first call."""

    def __init__(self, write: Callable[[Any], Any]) -> None:
        super().__init__()
        self.mlp, self.write, self.is_done = Mlp(), write, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_done:
            self.write(self.mlp.a.weight)
            self.is_done = True
        y: Tensor = self.mlp(x)
        return y


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda w: w.div_(2),
    "operator": lambda w: w.__imul__(2),
    "data": lambda w: w.data.mul_(2),
    "row of data": lambda w: w.data[0].mul_(3),
    "view": lambda w: w.T.view(-1)[:3].zero_() if w.T.is_contiguous() else w.view(-1)[:3].zero_(),
    "detached": lambda w: w.detach().fill_(0.1),
    "out": lambda w: torch.div(w, 2, out=w),
    "list": lambda w: torch._foreach_mul_([w], 2),
    "new data": lambda w: setattr(w, "data", w.data * 2),
    "initialization": nn.init.ones_,
}


@pytest.mark.parametrize("is_root", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_to_a_parameter_is_left_to_the_model(write: Any, is_root: bool) -> None:
    part = Rescales(write).requires_grad_(False)
    module: nn.Module = part if is_root else nn.Sequential(part, nn.Linear(WIDTH, 4))
    before, address = copy.deepcopy(module.state_dict()), part.mlp.a.weight.data_ptr()
    gm = trace(module, (example(),))
    assert [p.path for p in opaque_parts(gm)] == ["" if is_root else "0"]
    assert (part.is_done, part.mlp.a.weight.data_ptr()) == (False, address)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    twin, x = copy.deepcopy(module), torch.randn(3, 4, WIDTH)
    with torch.no_grad():
        for _ in range(3):  # the first call writes, the others do not
            assert torch.equal(gm(x), twin(x))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in module.state_dict().items())
    assert not torch.equal(part.mlp.a.weight, before["mlp.a.weight" if is_root else "0.mlp.a.weight"])


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda x: torch.randn(WIDTH),
    "computed": lambda x: 2 * torch.rand(x.shape[-1]) + 1,
    "in place": lambda x: x.new_empty(WIDTH).uniform_(),
    "like": lambda x: torch.randn_like(x[0, 0]),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_that_are_kept_are_left_to_the_model(draw: Any) -> None:
    def keeps(self: Any, x: Tensor) -> Tensor:
        if not hasattr(self, "noise"):
            self.noise = draw(x)
        y: Tensor = self.mlp(x) * self.noise
        return y

    module = Net(keeps)
    gm, x = trace(module, (example(),)), torch.randn(3, 4, WIDTH)
    assert [(part.path, "`noise`" in part.problem) for part in opaque_parts(gm)] == [
        *[("layers.0", True), ("layers.1", True)]
    ]
    with torch.no_grad():
        first = gm(x)
        assert torch.equal(gm(x), first)
        assert torch.equal(module(x), first)


def test_kept_tensors_that_are_not_random_stay_in_the_graph() -> None:
    def keeps(self: Any, x: Tensor) -> Tensor:
        self.last = x + torch.rand_like(x)  # of this call, so not kept for the next one
        self.scale = torch.arange(WIDTH)
        y: Tensor = self.mlp(x) * self.scale
        return y

    assert opaque_parts(trace(Net(keeps), (example(),))) == ()
