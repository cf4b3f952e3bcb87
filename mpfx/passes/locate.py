"""Find what to compress and annotate it."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from mpfx.graph import InputGroup, input_groups, sites
from mpfx.passes.base import PassResult

GROUP = "mpfx_group"
"""Key of ``node.meta`` under which a group's first site holds the :class:`mpfx.graph.InputGroup`."""


@dataclass(frozen=True)
class LocateSites:
    """Annotate every input group that is to be compressed, at the node of its first site.

    Args:
        dense: patterns of module paths (``fnmatch``) that stay as they are.
        heads: module paths that stay as they are, whether they are sites or not.
    """

    dense: Collection[str] = ()
    heads: Collection[str] = ()

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
        skip = {s.path for s in sites(gm) if s.path in self.heads or any(fnmatchcase(s.path, p) for p in self.dense)}
        nodes = {str(node.target): node for node in reversed(gm.graph.nodes) if node.op == "call_module"}
        for group in input_groups(gm, skip):
            nodes[group.sites[0].path].meta[GROUP] = group
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        """Something has to be left to compress."""
        if not located(gm):
            found = [f"{s.path} ({s.dense_reason or 'named to stay dense'})" for s in sites(gm)]
            raise ValueError(f"no Linear is left to compress; found {_few(found)}.")


def _few(items: list[str]) -> str:
    shown = ", ".join(items[:8]) or "no Linear at all"
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def annotated(gm: fx.GraphModule, key: str) -> Iterator[fx.Node]:
    """Nodes that carry an annotation, in graph order."""
    return (node for node in gm.graph.nodes if key in node.meta)


def located(gm: fx.GraphModule) -> list[InputGroup]:
    """Annotated input groups in the order of solving."""
    return [node.meta[GROUP] for node in annotated(gm, GROUP)]
