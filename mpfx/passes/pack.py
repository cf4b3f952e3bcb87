"""Install packed modules in the user's own model."""

from dataclasses import dataclass

from torch import fx

from mpfx.nn import MixedPrecisionLinear
from mpfx.passes.base import PassResult
from mpfx.passes.locate import annotated
from mpfx.passes.solve import SOLVED, SolvedGroup


@dataclass(frozen=True)
class Pack:
    """Put a :class:`mpfx.nn.MixedPrecisionLinear` in the place of every solved site.

    All modules are made before the first one is installed, so a failure leaves the model as it was.
    """

    def requires(self, gm: fx.GraphModule) -> None:
        """Something is solved."""
        if not any(annotated(gm, SOLVED)):
            raise ValueError("Expected solved sites: run PruneAndQuantize before.")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Replace."""
        modules: dict[str, MixedPrecisionLinear] = {}
        for node in annotated(gm, SOLVED):
            modules.update(packed_modules(gm, node.meta[SOLVED]))
        for path, module in modules.items():
            gm.set_submodule(path, module)
        return PassResult(gm, modified=True)

    def ensures(self, gm: fx.GraphModule) -> None:
        """Every solved site runs packed."""
        for node in annotated(gm, SOLVED):
            for path in node.meta[SOLVED].weights:
                if not isinstance(gm.get_submodule(path), MixedPrecisionLinear):
                    raise ValueError(f"site {path} was solved but is not packed.")


def packed_modules(gm: fx.GraphModule, solved: SolvedGroup) -> dict[str, MixedPrecisionLinear]:
    """Build the modules of one group, by path; they share the permutation."""
    modules = {}
    for path, weight in solved.weights.items():
        site = gm.get_submodule(path)
        dense = site.get_parameter("weight")
        bias = getattr(site, "bias", None)
        packed = MixedPrecisionLinear(weight, permutation=solved.permutation, bias=bias, dtype=dense.dtype)
        modules[path] = packed.to(dense.device).train(site.training)
    return modules
