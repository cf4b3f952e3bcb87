"""Manifests: what they may say."""

from pathlib import Path

import pytest

import mpfx
from tests.hub.models import Change, edit, field, own, refused, site, tie, top, without

MANIFESTS: list[tuple[str, Change, str]] = [
    ("other format", top(format="gguf"), "to be 'mpfx' version 3 or 4 but got 'gguf' version 3"),
    ("other version", top(version=99), "version 3 or 4 but got 'mpfx' version 99"),
    ("true version", top(version=True), "version 3 or 4 but got 'mpfx' version True"),
    ("list version", top(version=[1]), r"version \[1\]"),
    ("no format", without("format"), "not a manifest of mpfx: expected an object with `format`"),
    ("other segment", top(segment=64), "expected `segment` to be 32 but got 64"),
    ("float segment", top(segment=32.0), r"expected `segment` to be 32 but got 32\.0"),
    ("no sites", without("sites"), r"\['sites'\] are lacking"),
    ("list of sites", top(sites=[]), r"expected `sites` to be an object .* but got \[\]"),
    ("empty sites", top(sites={}), r"expected `sites` to be an object with an entry"),
    ("root site", lambda m: m["sites"].update({"": m["sites"]["q"]}), "expected `sites`"),
    ("list entry", lambda m: m["sites"].update(q=[]), r"site q: expected the entry to be an object but got \[\]"),
    ("tied is null", top(tied=None), "expected `tied` to be an object"),
    ("tied to numbers", tie("head.weight", 3), "expected `tied` to be an object that maps"),
    ("tied to a list", tie("head.weight", ["embed.weight"]), "expected `tied`"),
    ("other library", top(library="numpy"), "expected `library` to be 'transformers' or absent"),
    ("library number", top(library={}), "expected `library`"),
    ("extra text", top(extra="x"), "expected `extra` to be an object"),
    ("unknown field", top(more=1), r"\['more'\] are unknown"),
    ("lacking field", lambda m: m["sites"]["q"].pop("dtype"), r"site q: expected the fields .*\['dtype'\] are lacking"),
    ("odd field", field("rotation", 1), r"site q: .*\['rotation'\] are unknown"),
    ("bool size", field("in_features", True), "site q: expected `in_features` to be a positive integer but got True"),
    ("zero size", field("out_features", 0), "expected `out_features` to be a positive integer but got 0"),
    ("float size", field("out_features", 32.0), "expected `out_features`"),
    ("huge size", field("in_features", 10**30), "Expected `mask` to be int32"),
    ("bool group", field("group_size", True), "expected `group_size` to be null or a positive multiple of 32"),
    ("odd group", field("group_size", 48), "multiple of 32 but got 48"),
    ("zero group", field("group_size", 0), "multiple of 32 but got 0"),
    ("other group", field("group_size", 64), "Expected `scales` to be .*float16 of shape"),
    (
        "int8",
        field("dtype", "int8"),
        "expected `dtype` to be one of float16, bfloat16, float32, float64 but got 'int8'",
    ),
    ("complex", field("dtype", "complex64"), "expected `dtype`"),
    ("dtype list", field("dtype", ["float32"]), "expected `dtype`"),
    ("dtype of torch", field("dtype", "nn"), "expected `dtype`"),
    ("bool order", field("permutation", False), "expected `permutation` to be null or an integer"),
    ("negative order", field("permutation", -1), "expected `permutation`"),
    ("lacking order", field("permutation", 7), r"site q: `mpfx:permutation:7` is missing"),
    ("unused order", field("permutation", None), r"holds \['mpfx:permutation:0'\], which no site"),
    ("unknown site", site("nope", "k"), r"site nope: `codes` is missing"),
    ("tied to nothing", tie("inner.norm.weight", "nope"), "inner.norm.weight -> nope: expected a tensor that is not"),
    ("tied to lacking", tie("head.weight", "nope"), "lacks nope"),
    ("tied to itself", tie("embed.weight", "embed.weight"), "expected a tensor that is not stored"),
    ("tied to tied", tie("table", "head.weight"), "lacks head.weight"),
    ("tied inside", tie("q.zeros", "embed.weight"), "outside the packed sites"),
    ("tied deep inside", tie("q.a.b.c", "embed.weight"), "outside the packed sites"),
    ("tied to inside", tie("head.weight", "q.bias"), "outside the packed sites"),
    ("tied to an order", tie("head.weight", "mpfx:permutation:0"), "outside the packed sites"),
    ("tied unknown", tie("nope.weight", "embed.weight"), r"holds \['nope\.weight'\], unknown to the model"),
    ("tied other shape", tie("head.weight", "inner.norm.weight"), r"other shapes than the model: \['head\.weight"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in MANIFESTS], ids=[c[0] for c in MANIFESTS])
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    mpfx.save(own(), tmp_path)
    edit(tmp_path, change)
    refused(tmp_path, message, own(packed=False).train())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[1]", "not a manifest"),
        (b"", "is damaged"),
        (b"[" * 99999, "is damaged"),
    ],
)
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    mpfx.save(own(), tmp_path)
    (tmp_path / "mpfx.json").write_bytes(text)
    refused(tmp_path, message, own(packed=False))
