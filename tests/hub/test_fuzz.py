"""Mutations of a valid checkpoint: each is refused with a clear error, or gives a model of the right shapes."""

import json
import math
import random
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mpfx
import mpfx.hub
from mpfx.hub.checkpoint import CheckpointError
from mpfx.nn import Layout, MixedPrecisionLinear, QuantizedWeight, pack
from tests.conftest import VOCABULARY, build_llama
from tests.hub.models import pack_linears

SECONDS = 10
"""Most processor time for one mutation, both loaders and what they give."""

MEMORY = 256 << 20
"""Most bytes that one mutation may add to the peak; the checkpoint has 0.2 MB, and hostile sizes are larger."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST, CONFIG = "mpfx.json", "config.json"

Mutate = Callable[[Path], object]
Mutation = tuple[str, Mutate]

HUGE = (2**31, 2**40, 2**63 - 1, 2**64, 10**30)
HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        "x",
        "../x",
        "mpfx",
        [],
        {},
        [[]],
        [0],
        {"": None},
        0,
        -1,
        1,
        31,
        33,
        0.5,
        math.nan,
        math.inf,
    ),
    *HUGE,
    *("\x00", "\ud800", "a" * 100_000),
)
"""What is put in the place of values in JSON."""


def unmasked(rows: int, channels: int) -> MixedPrecisionLinear:
    """A layer of several widths without a mask."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(channels, (4, 16, 3, 0)[: -(-channels // 32)], None)
    codes = torch.zeros(rows, channels, dtype=torch.int32)
    for run in layout.runs:
        if run.quantized:
            codes[:, run.start : run.stop] = torch.randint(0, 1 << run.bits, (rows, run.channels), generator=generator)
    scales = torch.rand(rows, len(layout.grids), generator=generator).half()
    return MixedPrecisionLinear(pack(QuantizedWeight(codes, scales, None, None, layout)))


def packed() -> Any:
    model = pack_linears(build_llama(num_hidden_layers=1, intermediate_size=96))
    model.model.layers[0].mlp.up_proj = unmasked(96, 64)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: of one file, and of shards."""
    base = tmp_path_factory.mktemp("fuzz")
    mpfx.save(packed(), base / "whole")
    mpfx.save(packed(), base / "shards", max_shard_size=20_000)
    return {name: base / name for name in ("whole", "shards")}


# Bytes


def flip(file: str, bit: int) -> Mutate:
    def mutate(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        (folder / file).write_bytes(data)

    return mutate


def cut(file: str, size: int) -> Mutate:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def append(file: str, more: bytes) -> Mutate:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes() + more)


def bits(choose: random.Random, first: int, last: int, count: int) -> list[int]:
    """Some of the bits of bytes ``first .. last - 1``."""
    return sorted(choose.sample(range(8 * first, 8 * last), count))


def of_bytes(folder: Path, choose: random.Random) -> Iterator[Mutation]:
    data = (folder / WEIGHTS).read_bytes()
    header, size = parse(data), len(data)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    ends = {start + offset for info in header.values() if "shape" in info for offset in info["data_offsets"]}
    places = {*range(9), start - 1, start, start + 1, size - 1, *ends, *(end - 1 for end in ends)}
    for place in sorted({*choose.sample(sorted(place for place in places if place < size), 40), *range(9), size - 1}):
        yield f"cut at {place}", cut(WEIGHTS, place)
    for more in (b"\0", b"x" * 8, bytes(4096), data):
        yield f"{len(more)} bytes more", append(WEIGHTS, more)
    for bit in range(64):
        yield f"length bit {bit}", flip(WEIGHTS, bit)
    for bit in bits(choose, 8, start, 110):
        yield f"header bit {bit}", flip(WEIGHTS, bit)
    for bit in bits(choose, start, size, 40):
        yield f"data bit {bit}", flip(WEIGHTS, bit)
    for file in (MANIFEST, CONFIG):
        for bit in bits(choose, 0, (folder / file).stat().st_size, 45):
            yield f"{file} bit {bit}", flip(file, bit)
        for _ in range(5):
            place = choose.randrange((folder / file).stat().st_size)
            yield f"{file} cut at {place}", cut(file, place)


# The header


def parse(data: bytes) -> dict[str, Any]:
    length = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def rewrite(change: Callable[[dict[str, Any]], str | None]) -> Mutate:
    """Change the header; or put a text in its place, if that is returned."""

    def mutate(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = parse(data)
        text = (change(header) or json.dumps(header)).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return mutate


def entry(name: str, **fields: Any) -> Mutate:
    return rewrite(lambda header: header[name].update(fields))


def of_header(folder: Path, choose: random.Random) -> Iterator[Mutation]:
    header = parse((folder / WEIGHTS).read_bytes())
    names = sorted(name for name in header if name != "__metadata__")
    for value in HOSTILE:
        name = choose.choice(names)
        yield f"{name} dtype {value!r:.20}", entry(name, dtype=value)
        yield f"{name} shape {value!r:.20}", entry(name, shape=value)
        yield f"{name} size {value!r:.20}", entry(name, shape=[value])
        yield f"{name} offset {value!r:.20}", entry(name, data_offsets=[0, value])
    for dtype in ("I8", "U8", "BOOL", "F16", "BF16", "I32", "F32", "I64", "F64", "F8_E5M2", "F4", "C64"):
        name = choose.choice(names)
        yield f"{name} is {dtype}", entry(name, dtype=dtype)
    for name in choose.sample(names, 12):
        shape, (start, end) = header[name]["shape"], header[name]["data_offsets"]
        yield f"{name} reversed", entry(name, shape=shape[::-1], data_offsets=[end, start])
        yield f"{name} earlier", entry(name, data_offsets=[start - 4, end - 4])
        yield f"{name} flat", entry(name, shape=[math.prod(shape)])
        yield f"{name} of zeros", entry(name, shape=[*shape, 0])
        yield f"{name} of ones", entry(name, shape=[*shape, *[1] * 60])
        yield f"{name} overflows", entry(name, shape=[2**32, 2**32, *shape])
        other = choose.choice(names)
        yield f"{name} as {other}", rewrite(lambda h, a=name, b=other: h.update({a: h[b], b: h[a]}))  # type: ignore[misc]
        yield f"{name} over {other}", rewrite(lambda h, a=name, b=other: h.update({a: h[b]}))  # type: ignore[misc]
        yield f"no {name}", rewrite(lambda h, a=name: h.pop(a) and None)  # type: ignore[misc]
        yield f"{name} twice", rewrite(lambda h, a=name: json.dumps(h)[:-1] + f', "{a}": {json.dumps(h[a])}}}')  # type: ignore[misc]
        yield f"{name} renamed", rewrite(lambda h, a=name: h.update({"a" * 100_000: h.pop(a)}))  # type: ignore[misc]
    for depth in (100, 100_000):
        yield f"nested {depth}", rewrite(lambda _, n=depth: "[" * n)  # type: ignore[misc]
        yield f"nested {depth} deep", rewrite(lambda _, n=depth: '{"a":' * n + "1" + "}" * n)  # type: ignore[misc]
    for text in ("{}", "[]", "null", "NaN", '{"__metadata__": 1}', '{"a": null}', "{" * 9, "\ufeff{}"):
        yield f"header {text}", rewrite(lambda _, t=text: t)  # type: ignore[misc]
    yield (
        "many names",
        rewrite(
            lambda h: h.update({f"n{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)})
        ),
    )


# Values


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Mutate:
    def mutate(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})

    return mutate


def of_values(folder: Path, choose: random.Random) -> Iterator[Mutation]:
    tensors = load_file(folder / WEIGHTS)
    for name in sorted(tensors):
        if name.endswith((".widths", ".mask", ".codes", ".scales", ".scale_codes", ".zeros")) or "mpfx:" in name:
            for value in (0, 1, 255) if name.endswith(".widths") else (0, -1):
                place = choose.randrange(tensors[name].numel())
                yield f"{name}[{place}] = {value}", edited(lambda t, n=name, p=place, v=value: set_at(t[n], p, v))  # type: ignore[misc]
            yield f"{name} shorter", edited(lambda t, n=name: t.update({n: t[n][:-1]}))  # type: ignore[misc]
            yield f"{name} longer", edited(lambda t, n=name: t.update({n: torch.cat([t[n], t[n][-1:]])}))  # type: ignore[misc]


def set_at(tensor: Tensor, place: int, value: int) -> None:
    tensor.view(-1)[place] = value % 2**16 if tensor.dtype == torch.uint16 else value


# JSON files


def paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values in JSON."""
    yield at
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from paths(data[key], (*at, key))


def replaced(file: str, at: tuple[Any, ...], value: Any) -> Mutate:
    def mutate(folder: Path) -> None:
        data = json.loads((folder / file).read_bytes())
        inner = data
        for key in at[:-1]:
            inner = inner[key]
        if at:
            inner[at[-1]] = value
        (folder / file).write_text(json.dumps(data if at else value), encoding="utf-8", errors="surrogatepass")

    return mutate


def both(at: tuple[Any, ...], value: Any) -> Mutate:
    """In the manifest, and in what the config says of it."""

    def mutate(folder: Path) -> None:
        replaced(MANIFEST, at, value)(folder)
        replaced(CONFIG, ("quantization_config", *at), value)(folder)

    return mutate


def of_json(folder: Path, choose: random.Random) -> Iterator[Mutation]:
    manifest, config = (json.loads((folder / file).read_bytes()) for file in (MANIFEST, CONFIG))
    places = list(paths(manifest))
    for value in (*HOSTILE, *HOSTILE):
        at = choose.choice(places)
        yield f"{MANIFEST} {at}: {value!r:.20}", replaced(MANIFEST, at, value)
        at = choose.choice(
            [at for at in places if at[:1] in (("sites",), ("tied",)) or at in (("version",), ("segment",))]
        )
        yield f"both {at}: {value!r:.20}", both(at, value)
        at = choose.choice(list(paths(config["quantization_config"], ("quantization_config",))))
        yield f"{CONFIG} {at}: {value!r:.20}", replaced(CONFIG, at, value)
    for key in sorted(set(config) - {"quantization_config"}):
        for value in choose.sample(HOSTILE, 3):
            yield f"{CONFIG} {key}: {value!r:.20}", replaced(CONFIG, (key,), value)
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "head_dim", "max_position_embeddings"):
        yield f"{CONFIG} {key} huge", replaced(CONFIG, (key,), 2**31)
    for file in (MANIFEST, CONFIG):
        yield f"{file} nested", lambda folder, f=file: (folder / f).write_text("[" * 100_000)  # type: ignore[misc]


def of_index(folder: Path, choose: random.Random) -> Iterator[Mutation]:
    index = json.loads((folder / INDEX).read_bytes())
    shard = sorted(index["weight_map"].values())[0]
    names = ("../" + shard, "/etc/passwd", "/dev/zero", "nope.safetensors", ".safetensors", "..", "a/b.safetensors")
    more = (
        "model.safetensors\x00.safetensors",
        CONFIG,
        "C:\\x.safetensors",
        "x" * 5000 + ".safetensors",
        "\ud800.safetensors",
    )
    for value in (*names, *more, *HOSTILE):
        at = ("weight_map", choose.choice(sorted(index["weight_map"])))
        yield f"index {at[1]}: {value!r:.20}", replaced(INDEX, at, value)
    for value in HOSTILE:
        yield f"index map {value!r:.20}", replaced(INDEX, ("weight_map",), value)
        yield f"index {value!r:.20}", replaced(INDEX, (), value)
    for bit in bits(choose, 0, (folder / INDEX).stat().st_size, 40):
        yield f"index bit {bit}", flip(INDEX, bit)
    yield "shard cut", cut(shard, 100)
    yield "shard lacking", lambda folder: (folder / shard).unlink()
    yield "shard is a folder", lambda folder: (folder / shard).rename(folder / "x") and (folder / shard).mkdir()
    yield "index nested", lambda folder: (folder / INDEX).write_text("[" * 100_000)


FAMILIES: dict[str, tuple[str, Callable[[Path, random.Random], Iterator[Mutation]]]] = {
    "bytes": ("whole", of_bytes),
    "header": ("whole", of_header),
    "values": ("whole", of_values),
    "json": ("whole", of_json),
    "index": ("shards", of_index),
}

COUNTS = {"bytes": 330, "header": 250, "values": 150, "json": 240, "index": 130}
"""Fewest mutations of every family, 1100 in all."""


# What must come of it

LOADERS: dict[str, Callable[[Path], Any]] = {"load": mpfx.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Of all dense weights, packed or not."""
    return {
        n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)
    }


def run(model: Any) -> None:
    """Few rows and many, which different kernels multiply."""
    for batch, length in ((1, 4), (2, 9)):
        with torch.no_grad():
            logits = model(torch.full((batch, length), 7)).logits
        assert logits.shape == (batch, length, VOCABULARY)


def problem(loader: str, folder: Path, wanted: dict[str, tuple[int, ...]], allowed: tuple[type[Exception], ...]) -> str:
    """What is wrong with what a loader makes of a folder; empty if nothing is."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model = LOADERS[loader](folder)
    except allowed as error:
        named = loader != "load" or str(folder) in str(error)
        found = "" if str(error) and named else f"no word of the folder: {error!r}"
    except Exception as error:
        found = f"another error: {error!r:.300}"
    else:
        found = "" if shapes(model) == wanted else "other shapes"
        run(model)
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return found or (f"{seconds:.0f} s" if seconds > SECONDS else f"{grown:,} bytes" if grown > MEMORY else "")


def allowed_errors(loader: str, folder: Path, source: Path) -> tuple[type[Exception], ...] | None:
    """The errors that a loader may raise; None where it is not asked.

    transformers reads the config and the index before mpfx has a say, and stumbles over them in its own ways: it builds
    as many layers as a config asks for, so that it sees no changes there but those of what is packed.
    """
    ours = (CheckpointError, FileNotFoundError)
    if loader == "load":
        return ours
    changed = {f for f in (CONFIG, INDEX) if (source / f).is_file() and not same(folder / f, source / f)}
    if CONFIG in changed:
        try:
            new, old = ({**json.loads((at / CONFIG).read_bytes()), "quantization_config": 0} for at in (folder, source))
        except (ValueError, TypeError, RecursionError):
            return None
        return (Exception,) if new == old else None
    return (Exception,) if changed else ours


def same(file: Path, other: Path) -> bool:
    return file.read_bytes() == other.read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in KiB, as Linux tells it")
@pytest.mark.parametrize("family", FAMILIES)
def test_mutations_are_refused_or_harmless(family: str, source: dict[str, Path], tmp_path: Path) -> None:
    form, mutations = FAMILIES[family]
    wanted, problems, count = shapes(packed()), [], 0
    for loader in LOADERS:  # as it is: kernels are compiled, and a checkpoint that is never loaded would prove nothing
        assert problem(loader, source[form], wanted, ()) == ""
    for label, mutate in mutations(source[form], random.Random(0)):
        folder = tmp_path / "mutated"
        shutil.copytree(source[form], folder)
        mutate(folder)
        for loader in LOADERS:
            allowed = allowed_errors(loader, folder, source[form])
            found = "" if allowed is None else problem(loader, folder, wanted, allowed)
            problems += [f"{label:.100}, {loader}: {found}"] if found else []
        shutil.rmtree(folder)
        count += 1
    assert not problems
    assert count >= COUNTS[family]
