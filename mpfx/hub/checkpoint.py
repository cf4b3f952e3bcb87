"""mpfx's own checkpoint: a folder with ``model.safetensors`` and ``mpfx.json``, which transformers loads as well.

``model.safetensors`` holds, little-endian, for every packed site ``<path>.codes``, ``.widths``, either ``.scales`` or
``.scale_codes``, ``.row_scales`` and ``.group_scales`` (see :class:`mpfx.nn.CodedScales`), and where they exist
``.zeros``, ``.mask`` and ``.bias`` (see :class:`mpfx.nn.PackedWeight`), for every packed parameter of experts the
same without ``.bias`` (see :class:`mpfx.nn.experts.PackedStack`), every permutation once as ``mpfx:permutation:<k>``,
all other parameters and persistent buffers of the model under their own names, and floating buffers that its state dict
leaves out (rotary tables, whose dtype depends on the model's history) as ``mpfx:buffer:<name>``. ``mpfx.json`` is the
manifest: format version (4 with packed experts, else 3), the packed sites and experts with their sizes, which tensors
share memory, and anything the caller adds. It is put in place last, so a folder with a manifest is whole.

A model that is larger than a shard is ``model-<i>-of-<n>.safetensors`` with ``model.safetensors.index.json``, as
transformers has it. Beside them lies whatever the model's own library needs: config, generation config, tokenizer, a
model card. ``quantization_config`` in a transformers model's ``config.json`` has ``quant_method`` "mpfx" and repeats
the manifest without ``format``, ``library`` and ``extra``; a folder that ``save_pretrained`` wrote has only this one.
"""

from mpfx.hub.contents import packed_sites, tensor_bytes
from mpfx.hub.loading import load
from mpfx.hub.manifest import MANIFEST, WEIGHTS, CheckpointError, is_checkpoint
from mpfx.hub.saving import save

__all__ = ["MANIFEST", "WEIGHTS", "CheckpointError", "is_checkpoint", "load", "packed_sites", "save", "tensor_bytes"]
