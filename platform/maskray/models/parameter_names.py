"""What others call the parameters of a vision transformer MAE, in one table each. Imports no torch.

Ours are the MAE authors' (`models_mae.py` of facebookresearch/mae). timm's are the same for what it has, the encoder.
Hugging Face's are those of its `ViTMAEForPreTraining`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, get_args

Format = Literal["mae", "hf", "timm"]
"""The names that others read."""
Kind = Literal[Format, "own"]
"""`own`: of a model that others do not have."""
FORMATS: tuple[Format, ...] = get_args(Format)

WHOSE: dict[Kind, str] = {
    "mae": "the MAE authors' names",
    "hf": "Hugging Face ViTMAE's names",
    "timm": "timm's names of an encoder (for transformers they are the MAE authors' too)",
    "own": "maskray's own names",
}
DECODER = ("decoder", "mask_token")
"""How ours begin for what is thrown away after pretraining."""
HEADS: dict[Kind, frozenset[str]] = {
    "mae": frozenset(),
    "hf": frozenset(),
    "timm": frozenset(
        f"{layer}.{leaf}" for layer in ("head", "fc", "head.fc", "head.norm", "norm_pre") for leaf in ("weight", "bias")
    ),
    "own": frozenset(),
}
"""Theirs for a classifier on top of the encoder, which pretraining has no use for."""
_TIMM_STAGES = ("layer1.", "stages.")
"""What timm's ResNets and ConvNeXts are made of; ours have them below `encoder.`, beside the decoder."""
_ENCODER = "encoder."

_HF_BASE = "vit."
_HF = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_HF_STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_HF_LAYERS = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_HF_SPELLINGS = {
    "vit.layers.": "vit.encoder.layer.",
    "decoder.decoder_encoder.layer.": "decoder.decoder_layers.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
"""Of transformers 5, whose modules have other names than the checkpoints it reads; what it writes is a mixture."""
_OF_A_BLOCK = re.compile(rf"({'|'.join(_HF_STACKS)})\.(\d+)\.(.+)")


def recognised(names: Collection[str]) -> Kind:
    """Whose names these are."""
    if any(name.startswith((_HF_BASE, "embeddings.", "encoder.layer.")) for name in names):
        return "hf"
    if any(name.startswith(_TIMM_STAGES) for name in names):
        return "timm"
    if "patch_embed.proj.weight" not in names:
        return "own"
    return "mae" if any(name.startswith(DECODER) for name in names) else "timm"


def as_published(kind: Kind, names: Collection[str]) -> dict[str, str]:
    """Their names as the tables have them, by what they are in a file: versions and the base model spell them anew."""
    if kind != "hf":
        return {name: name for name in names}
    base = "" if any(name.startswith(_HF_BASE) for name in names) else _HF_BASE
    published = {}
    for name in names:
        full = base + name
        for spelling, usual in _HF_SPELLINGS.items():
            full = full.replace(spelling, usual)
        published[name] = name if full in names else full
    return published


def theirs(kind: Kind, name: str) -> tuple[str, ...]:
    """Their tensors that, one below the other, are ours of a name; ours where they have no such parameter."""
    if kind == "timm":
        return (name.removeprefix(_ENCODER),)
    if kind != "hf":
        return (name,)
    if name in _HF:
        return (_HF[name],)
    stem, _, leaf = name.rpartition(".")
    if stem in _HF:
        return (f"{_HF[stem]}.{leaf}",)
    block = _OF_A_BLOCK.fullmatch(stem)
    layers = _HF_LAYERS.get(block[3], ()) if block else ()
    return tuple(f"{_HF_STACKS[block[1]]}.{block[2]}.{layer}.{leaf}" for layer in layers if block) or (name,)
