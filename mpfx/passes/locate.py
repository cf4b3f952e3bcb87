"""Analysis passes: find what to compress, what reads the same value, and what made it. They only annotate."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from mpfx.graph import (
    InputGroup,
    Site,
    calling_nodes,
    input_groups,
    is_linear,
    permutation_folds,
    sites,
    traced_module,
)
from mpfx.passes.base import Pass, PassResult
from mpfx.passes.scope import Scope, few

SITE = "mpfx_site"
"""Key of ``node.meta`` under which a node holds the :class:`mpfx.graph.Site` entries to compress, by path."""

GROUP = "mpfx_group"
"""Key under which the node of a group's first site holds the :class:`mpfx.graph.InputGroup`, by name."""

FOLD = "mpfx_fold"
"""Key under which it holds the :class:`mpfx.graph.PermutationFold` of the group, by the group's name."""


@dataclass(frozen=True)
class LocateSites(Pass):
    """Annotate every site that is to be compressed.

    Args:
        scope: which ones.
    """

    scope: Scope = field(default_factory=Scope)

    def requires(self, gm: fx.GraphModule) -> None:
        """Every pattern has to match a site."""
        self.scope.check(sites(gm))

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Annotate."""
        dense = self.reasons(gm)
        annotate(gm, SITE, [(site, site.path, site) for site in sites(gm) if site.path not in dense])
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        """Something has to be left to compress."""
        if not annotations(gm, SITE):
            if is_linear(traced_module(gm)):
                raise ValueError("the module to compress is itself one Linear: name the module that holds it.")
            found = [f"{path} ({reason})" for path, reason in self.reasons(gm).items()]
            raise ValueError(f"no Linear is left to compress; found {few(found)}.")

    def reasons(self, gm: fx.GraphModule) -> dict[str, str]:
        """Why sites stay as they are, by path."""
        heads = output_heads(traced_module(gm))
        found = {site.path: site.dense_reason or self.scope.reason(site, heads) for site in sites(gm)}
        partial = {site.stack: site.path for site in sites(gm) if site.stack is not None and found[site.path]}
        for site in sites(gm):  # experts of one parameter are stored as one stack
            if site.stack in partial and not found[site.path]:
                found[site.path] = f"{partial[site.stack]}, which is stored with it, stays dense"
        return {path: reason for path, reason in found.items() if reason}


@dataclass(frozen=True)
class GroupInputs(Pass):
    """Annotate every input group of the located sites, at the node of its first one."""

    def requires(self, gm: fx.GraphModule) -> None:
        """Sites are located."""
        if not annotations(gm, SITE):
            raise ValueError("Expected located sites: run LocateSites before.")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Annotate."""
        chosen = annotations(gm, SITE)
        groups = input_groups(gm, skip=[site.path for site in sites(gm) if site.path not in chosen])
        annotate(gm, GROUP, [(group.sites[0], group.name, group) for group in groups])
        return PassResult(gm, modified=False)

    def ensures(self, gm: fx.GraphModule) -> None:
        """Every located site is in one group."""
        grouped = [site.path for group in located(gm) for site in group.sites]
        if sorted(grouped) != sorted(annotations(gm, SITE)):
            raise ValueError("some located sites are in no input group, or in several.")


@dataclass(frozen=True)
class FindProducers(Pass):
    """Annotate the input groups whose channels can be reordered by reordering rows of the sites that make them."""

    def requires(self, gm: fx.GraphModule) -> None:
        """Input groups are known."""
        if not located(gm):
            raise ValueError("Expected input groups: run LocateSites and GroupInputs before.")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Annotate."""
        folds = {frozenset(fold.sites): fold for fold in permutation_folds(gm)}
        found = [(g, folds.get(frozenset(site.path for site in g.sites))) for g in located(gm)]
        annotate(gm, FOLD, [(group.sites[0], group.name, fold) for group, fold in found if fold is not None])
        return PassResult(gm, modified=False)


def analysis(scope: Scope | None = None) -> list[Pass]:
    """The analysis passes in their order; everything is in scope if none is given."""
    return [LocateSites(scope or Scope()), GroupInputs(), FindProducers()]


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the modules that a model itself names as its output head (transformers' ``get_output_embeddings``)."""
    named: list[Any] = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    heads = [module.get_output_embeddings() for module in named]
    return {path for path, module in model.named_modules() if any(module is head for head in heads)}


def annotate(gm: fx.GraphModule, key: str, entries: Sequence[tuple[Site, str, Any]]) -> None:
    """Write annotations anew: ``(site, name, value)`` goes under ``name`` to the node that calls the site."""
    for node in gm.graph.nodes:
        node.meta.pop(key, None)
    callers = calling_nodes(gm)
    for site, name, value in entries:
        callers[site.path].meta.setdefault(key, {})[name] = value


def annotations(gm: fx.GraphModule, key: str) -> dict[str, Any]:
    """All annotations of one kind by name, in graph order."""
    return {name: value for entries in _entries(gm, key) for name, value in entries.items()}


def _entries(gm: fx.GraphModule, key: str) -> Iterator[Mapping[str, Any]]:
    return (node.meta[key] for node in gm.graph.nodes if key in node.meta)


def located(gm: fx.GraphModule) -> list[InputGroup]:
    """Annotated input groups in the order of solving."""
    return list(annotations(gm, GROUP).values())


@contextmanager
def naming_sites(group: InputGroup) -> Iterator[None]:
    """Put the paths of a group's sites before what goes wrong inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"sites {', '.join(site.path for site in group.sites)}: {error}") from error
