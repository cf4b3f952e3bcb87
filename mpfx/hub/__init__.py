"""Models in and out: sources, checkpoints and exports.

Importing this package registers mpfx with transformers: from then on ``AutoModelForCausalLM.from_pretrained`` loads
checkpoints of mpfx, from a folder or from the Hub.
"""

from mpfx.hub.transformers import MpfxConfig, MpfxQuantizer

__all__ = ["MpfxConfig", "MpfxQuantizer"]
