"""Which sites are compressed."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from mpfx.graph import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which sites are compressed; the others stay dense and keep working.

    Args:
        include: patterns of module paths (``fnmatch``, as ``model.layers.*``); a site has to match one of them.
        exclude: patterns of module paths that stay as they are.
        min_weights: sites with fewer weights stay as they are.
        kinds: linear: Linear layers; transposed: such that store their weight as (in, out), as GPT-2's; expert:
            experts in one three-dimensional parameter.
        head: also compress the output head; one that is tied to the embedding always stays dense.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    min_weights: int = 0
    kinds: tuple[Literal["linear", "transposed", "expert"], ...] = ("linear", "transposed", "expert")
    head: bool = False

    def __post_init__(self) -> None:
        if odd := set(self.kinds) - set(get_args(SiteKind)):
            raise ValueError(f"Expected `scope.kinds` among {list(get_args(SiteKind))} but got {sorted(odd)}.")
        if self.min_weights < 0:
            raise ValueError(f"Expected `scope.min_weights` of 0 or more but got {self.min_weights}.")

    def check(self, found: Sequence[Site]) -> None:
        """Refuse patterns that match nothing: they are typing errors.

        Raises:
            ValueError: naming the pattern and what there is.
        """
        paths = [site.path for site in found]
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if pattern != "*" and not any(fnmatchcase(path, pattern) for path in paths):
                    raise ValueError(
                        f"Expected `scope.{name}` to match sites but {pattern!r} matches none of {few(paths)}."
                    )

    def reason(self, site: Site, heads: set[str]) -> str | None:
        """Why a site is out of scope, or None."""
        if site.path in heads and not self.head:
            return "it is the output head (`scope.head`)"
        if not any(fnmatchcase(site.path, pattern) for pattern in self.include):
            return "it is not among those to compress (`scope.include`)"
        if any(fnmatchcase(site.path, pattern) for pattern in self.exclude):
            return "it was named to stay dense (`scope.exclude`)"
        if site.in_features * site.out_features < self.min_weights:
            return f"it has fewer than {self.min_weights} weights (`scope.min_weights`)"
        if site.kind not in self.kinds:
            return f"its kind is {site.kind} (`scope.kinds`)"
        return None


def few(items: Sequence[str]) -> str:
    """The first of some names, for messages."""
    shown = ", ".join(items[:8]) or "no Linear at all"
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")
