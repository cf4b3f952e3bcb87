"""Find what to compress and annotate it."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from mpfx.graph import InputGroup, input_groups, sites, traced_module
from mpfx.passes.base import PassResult

GROUP = "mpfx_group"
"""Key of ``node.meta`` under which a group's first site holds the :class:`mpfx.graph.InputGroup`."""


@dataclass(frozen=True)
class LocateSites:
    """Annotate every input group that is to be compressed, at the node of its first site.

    Args:
        dense: patterns of module paths (``fnmatch``) that stay as they are.
        compress_head: whether output heads are compressed too.
    """

    dense: Collection[str] = ()
    compress_head: bool = False

    def requires(self, gm: fx.GraphModule) -> None:
        """Every pattern has to match a site: one that does not is a typing error."""
        paths = [site.path for site in sites(gm)]
        for pattern in self.dense:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"Expected `dense` to match Linear modules but {pattern!r} matches none of {_few(paths)}."
                )

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Annotate."""
        nodes = {str(node.target): node for node in reversed(gm.graph.nodes) if node.op == "call_module"}
        for group in input_groups(gm, self.reasons(gm).keys()):
            nodes[group.sites[0].path].meta[GROUP] = group
        return PassResult(gm, modified=False)

    def reasons(self, gm: fx.GraphModule) -> dict[str, str]:
        """Why Linears stay as they are, by module path."""
        heads = set() if self.compress_head else output_heads(traced_module(gm))
        found = {}
        for site in sites(gm):
            if site.dense_reason:
                found[site.path] = site.dense_reason
            elif site.path in heads:
                found[site.path] = "it is the output head (`compress_head`)"
            elif any(fnmatchcase(site.path, pattern) for pattern in self.dense):
                found[site.path] = "it was named to stay dense (`dense`)"
        return found

    def ensures(self, gm: fx.GraphModule) -> None:
        """Something has to be left to compress."""
        if not located(gm):
            found = [f"{path} ({reason})" for path, reason in self.reasons(gm).items()]
            raise ValueError(f"no Linear is left to compress; found {_few(found)}.")


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the modules that a model itself names as its output head (transformers' ``get_output_embeddings``)."""
    named: list[Any] = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    heads = [module.get_output_embeddings() for module in named]
    return {path for path, module in model.named_modules() if any(module is head for head in heads)}


def _few(items: list[str]) -> str:
    shown = ", ".join(items[:8]) or "no Linear at all"
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def annotated(gm: fx.GraphModule, key: str) -> Iterator[fx.Node]:
    """Nodes that carry an annotation, in graph order."""
    return (node for node in gm.graph.nodes if key in node.meta)


def located(gm: fx.GraphModule) -> list[InputGroup]:
    """Annotated input groups in the order of solving."""
    return [node.meta[GROUP] for node in annotated(gm, GROUP)]
