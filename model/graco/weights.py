"""Published SimpleClick and GraCo tensors under our names and back, bit for bit, each name and shape checked.

A base is SimpleClick's whole network; its fused `attn.qkv` becomes `attn.q_proj`, `k_proj` and `v_proj`. An adapter is
GraCo's loralib matrices on Q and V of that layer, the granularity embedding and the phrase projection; it becomes an
adapter file as `model.adapter` has it: branch `level` of `lora_A`/`lora_B`, branch `phrase` of `lora_A2`/`lora_B2`.

Sources: the names of uncbiag/SimpleClick and Zhao-Yian/GraCo; loralib's `MergedLinear` for the order of its rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.adapter import AdapterFile
from model.graco.inputs import RADIUS, WINDOW, Architecture
from model.types import LEVELS, Refusal

LEVEL, PHRASE = "level", "phrase"
"""Branches of an adapter: which signal's LoRA is on; never both."""
LEVEL_EMBEDDING = "backbone.gra_embed.weight"
PHRASE_WEIGHT, PHRASE_BIAS = "phrase_encoder.phrase2gra_proj.weight", "phrase_encoder.phrase2gra_proj.bias"
RANK, ALPHA = 8, 1
"""Of the published adapters; the published code reads no others."""

Kind = Literal["base", "adapter"]

_KNOWN = {  # width to name, depth and heads
    160: ("vit_xtiny", 8, 4),
    768: ("vit_b", 12, 12),
    1024: ("vit_l", 24, 16),
    1280: ("vit_h", 32, 16),
}
_FUSED = re.compile(r"(backbone\.blocks\.\d+\.attn\.)qkv\.(weight|bias)")
_PARTS = ("q_proj", "k_proj", "v_proj")
_LORA = re.compile(r"(backbone\.blocks\.(\d+)\.attn\.)qkv\.lora_([AB])(2?)")
_OURS = re.compile(r"(backbone\.blocks\.\d+\.attn\.)([qv])_proj\.lora_([AB])\.weight")
_UNUSED = ("backbone.cls_token", "backbone.fc_norm.", "backbone.head.")  # of the classifier the ViT was trained with
_TEXT_TOWER = "phrase_encoder.model."  # CLIP, which some trainings save along
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_COMPUTED = {  # what the network computes: a config that says otherwise is of another one
    "use_disks": True,
    "norm_radius": RADIUS,
    "with_prev_mask": True,
    "random_split": False,
    "with_aux_output": False,
    "use_rgb_conv": False,
    "norm_mean_std": [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]],
}


def part(tensors: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Return the tensors of one kind: an adapter's, or all others; CLIP's text tower is of neither."""
    return {
        name: value
        for name, value in tensors.items()
        if _of_adapter(name) == (kind == "adapter") and not name.startswith(_TEXT_TOWER)
    }


def kinds_of(tensors: Iterable[str]) -> set[Kind]:
    """Return what a published checkpoint holds by its names: a base, an adapter, or both."""
    return {"adapter" if _of_adapter(name) else "base" for name in tensors if not name.startswith(_TEXT_TOWER)}


def architecture_of(tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Architecture:
    """Return the architecture of a published base.

    Args:
        tensors: under their published names.
        config: the checkpoint's, if it has one; asked for what shapes do not tell: the number of heads.

    Raises:
        Refusal: the tensors are not SimpleClick's, or the config tells of what this network does not compute.
    """
    params = _params(config)
    for name, expected in _COMPUTED.items():
        if params.get(name, expected) != expected:
            raise Refusal(
                f"the checkpoint was trained with {name} = {str(params[name])[:80]}, and this network computes "
                f"{name} = {expected} alone; import one that was"
            )
    try:
        position = tensors["backbone.pos_embed"]
        width, patch = tensors["backbone.patch_embed.proj.weight"].shape[0::3]
        ends = ("down_4.5", "down_8.2", "down_16.0", "down_32.2")
        c4, c8, c16, c32 = (tensors[f"neck.{end}.weight"].shape[0] for end in ends)
        head, last = tensors["head.fusion_conv.conv.weight"].shape[0], tensors["head.conv_seg.weight"].shape[1]
        grid = round((position.shape[1] - 1) ** 0.5)
    except (KeyError, IndexError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "some have other shapes"
        raise Refusal(
            f"these are not the tensors of a SimpleClick ViT checkpoint ({what}); import one such as "
            "sbd_vit_base.pth, cocolvis_vit_large.pth or GraCo_base_lora.pth"
        ) from error
    depth = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"backbone\.blocks\.(\d+)\.", name))), default=-1)
    known, known_depth, known_heads = _KNOWN.get(width, ("", 0, 0))
    heads = _entry(params, "backbone_params", "num_heads") or known_heads
    if grid < 1 or grid**2 + 1 != position.shape[1]:
        raise Refusal(f"the position embedding has {position.shape[1] - 1} places, which is no square grid")
    if type(heads) is not int or not heads or width % heads:
        raise Refusal(f"how many attention heads a width of {width} has is not known, and the checkpoint does not tell")
    if depth < 4 or depth % 4 or depth > len(tensors):  # the number in a name may be any
        raise Refusal(f"the checkpoint has {depth} blocks; SimpleClick's networks have a multiple of 4")
    if not 0 < patch <= WINDOW:
        raise Refusal(f"the checkpoint cuts patches of {patch} pixels; SimpleClick's networks take 16, or 14")
    if last not in (head, head // 2, head // 4):
        raise Refusal(f"the head joins {head} channels and answers from {last}; import a checkpoint of SimpleClick")
    return Architecture(
        name=known if (known_depth, known_heads) == (depth, heads) else f"vit_{width}x{depth}",
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        size=grid * patch,
        neck=(c4, c8, c16, c32),
        head=head,
        doublings=(head, head // 2, head // 4).index(last),
    )


def check(tensors: dict[str, Tensor], architecture: Architecture) -> tuple[str, ...]:
    """Check a published base, and return the names of the tensors that the network does not use.

    Raises:
        Refusal: names are missing or left over, shapes are others, or values are not finite or not fp32, fp16 or bf16.
    """
    expected = _published_shapes(architecture)
    idle = {name for name in tensors if name.startswith(_UNUSED)}
    spare = {name for name in expected if _is_spare(name, architecture)}
    _compare(tensors, expected, f"SimpleClick {architecture.name}", may_miss=spare, may_have=idle)
    return tuple(sorted(idle | (spare & tensors.keys())))


def ours(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a published base's tensors under our names: `attn.qkv` becomes three views of it."""
    renamed: dict[str, Tensor] = {}
    for name, value in published.items():
        if fused := _FUSED.fullmatch(name):
            thirds = zip(_PARTS, value.chunk(3), strict=True)
            renamed |= {f"{fused[1]}{third}.{fused[2]}": rows for third, rows in thirds}
        else:
            renamed[name] = value
    return renamed


def published(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a base's tensors under their published names; the inverse of `ours`."""
    renamed: dict[str, Tensor] = {}
    for name, value in own.items():
        before, _, after = name.partition("_proj.")
        if name.endswith((".q_proj.weight", ".q_proj.bias")):
            block = before.removesuffix("q")
            renamed[f"{block}qkv.{after}"] = torch.cat([own[f"{block}{third}.{after}"] for third in _PARTS])
        elif not name.endswith(tuple(f".{third}.{kind}" for third in _PARTS[1:] for kind in ("weight", "bias"))):
            renamed[name] = value
    return renamed


def network_state(own: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return what `SimpleClick(architecture)` loads strictly, fp32, of a base's tensors under our names.

    What the published ViT has beside is left out; a doubling that the head does not do and early checkpoints do not
    have is filled with zeros.
    """
    shapes = _network_shapes(architecture)
    spare = {k: torch.zeros(v.shape) for k, v in shapes.items() if _is_spare(k, architecture) and k not in own}
    return {name: value.float() for name, value in own.items() if not name.startswith(_UNUSED)} | spare


def write_base(path: Path, own: dict[str, Tensor], architecture: Architecture) -> None:
    """Write a base's weights file (safetensors): tensors under our names, in their precision, and the architecture."""
    tensors = {name: value.contiguous() for name, value in own.items()}
    save_file(tensors, path, {"architecture": json.dumps(asdict(architecture))})  # one entry: their order is random
    path.chmod(0o644)  # safetensors writes for its owner alone


def read_base(path: Path, *, values: bool = True) -> tuple[dict[str, Tensor], Architecture]:
    """Return the tensors of a base's weights file, under our names and in its precision, and their architecture.

    Args:
        path: the file.
        values: read the tensors, too; else there are none.

    Raises:
        Refusal: it is missing, damaged, or not of this family.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "card" in metadata:
                raise Refusal(f"{path} is an adapter, not a base; name the base it is for")
            told = json.loads(metadata["architecture"])
            names = file.keys() if values else ()
            tensors = {name: file.get_tensor(name) for name in names}
        return tensors, Architecture(**told | {"neck": tuple(told["neck"])})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(
            f"weights {path} cannot be read ({error!r}); import the published checkpoint again: "
            "python -m ml_backend weights import FILE"
        ) from error


def adapter_size(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Return the width and the number of blocks of the base that a published adapter is for.

    Raises:
        Refusal: it is no adapter.
    """
    blocks = [int(match[2]) for name in tensors if (match := _LORA.fullmatch(name))]
    if not blocks or LEVEL_EMBEDDING not in tensors or any(value.ndim == 0 for value in tensors.values()):
        lacks = "LoRA matrices" if not blocks else LEVEL_EMBEDDING
        raise Refusal(f"these are not the tensors of a GraCo adapter: {lacks} missing; import it as published")
    return tensors[LEVEL_EMBEDDING].shape[-1], 1 + max(blocks)


def adapter_from_published(tensors: dict[str, Tensor], architecture: Architecture, base_digest: str) -> AdapterFile:
    """Return a published adapter as an adapter file for a base; values are kept bit for bit.

    Args:
        tensors: under their published names.
        architecture: of the base.
        base_digest: of the base's weights file.

    Raises:
        Refusal: names, shapes or values are not those of an adapter for this architecture.
    """
    width, depth = adapter_size(tensors)
    if (width, depth) != (architecture.width, architecture.depth):
        raise Refusal(
            f"the adapter is for a base of width {width} with {depth} blocks, and this base, {architecture.name}, has "
            f"{architecture.width} and {architecture.depth}; import it with the base it was trained on: --base NAME"
        )
    found = [match for name in tensors if (match := _LORA.fullmatch(name))]
    first, which = tensors[found[0][0]], found[0][3]
    rank = first.shape[0] // 2 if which == "A" else first.shape[-1]
    second = any(match[4] for match in found)
    _compare(tensors, _adapter_shapes(architecture, rank, phrase=second, text=_text_width(tensors)), "a GraCo adapter")
    if rank != RANK:
        raise Refusal(f"the adapter has rank {rank}; the published code reads and writes rank {RANK} alone")
    plain = {name: value for name, value in tensors.items() if not _LORA.fullmatch(name)}
    lora: dict[str, dict[str, Tensor]] = {LEVEL: {}, PHRASE: {}} if second else {LEVEL: {}}
    for match in found:
        branch = lora[PHRASE if match[4] else LEVEL]
        for part, rows in zip("qv", tensors[match[0]].chunk(2), strict=True):
            branch[f"{match[1]}{part}_proj.lora_{match[3]}.weight"] = rows
    card: dict[str, Any] = {"base": base_digest, "rank": rank, "alpha": ALPHA}
    if halves := {name: str(v.dtype)[6:] for name, v in tensors.items() if v.dtype != torch.float32}:
        card["dtypes"] = halves
    return AdapterFile(card, plain, lora)


def adapter_to_published(adapter: AdapterFile) -> dict[str, Tensor]:
    """Return an adapter of this family under the published names; the inverse of `adapter_from_published`.

    Raises:
        Refusal: it is not an adapter of this family, or scales its matrices otherwise than the published code does.
    """
    strangers = sorted(adapter.lora.keys() - {LEVEL, PHRASE}) or sorted(
        name for matrices in adapter.lora.values() for name in matrices if not _OURS.fullmatch(name)
    )
    if strangers or LEVEL_EMBEDDING not in adapter.plain:
        raise Refusal(f"this is no adapter of the graco family: {(strangers or [LEVEL_EMBEDDING])[0]} does not fit")
    if adapter.card["alpha"] != ALPHA or adapter.card["rank"] != RANK:
        raise Refusal(
            f"the adapter has rank {adapter.card['rank']} and alpha {adapter.card['alpha']}, and the published code "
            f"reads rank {RANK} and alpha {ALPHA} alone; train one with these"
        )
    tensors: dict[str, Tensor] = {}
    for branch, matrices in adapter.lora.items():
        suffix = "2" if branch == PHRASE else ""
        for name, q in matrices.items():
            match = _OURS.fullmatch(name)
            if match and match[2] == "q":
                v = matrices[f"{match[1]}v_proj.lora_{match[3]}.weight"]
                tensors[f"{match[1]}qkv.lora_{match[3]}{suffix}"] = torch.cat([q, v])
    dtypes = adapter.card.get("dtypes", {})
    return {name: v.to(_DTYPES[dtypes.get(name, "float32")]) for name, v in (tensors | adapter.plain).items()}


def make_config(architecture: Architecture, *, branches: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the config with which the published code builds a network, in plain data.

    Args:
        architecture: of the base.
        branches: of the adapter the config is for; None: for the base.
    """
    adapted, phrase = branches is not None, PHRASE in (branches or ())
    side, neck, a = [architecture.size] * 2, list(architecture.neck), architecture
    values: dict[str, Any] = {
        "backbone_params": {
            **{"img_size": side, "patch_size": [a.patch] * 2, "in_chans": 3, "embed_dim": a.width, "depth": a.depth},
            **{"num_heads": a.heads, "mlp_ratio": 4, "qkv_bias": True},
            **({"enable_gra": True} if adapted else {}),
        },
        "neck_params": {"in_dim": a.width, "out_dims": neck},
        "head_params": {
            **{"in_channels": neck, "in_index": [0, 1, 2, 3], "dropout_ratio": 0.1, "num_classes": 1},
            **{"loss_decode": None, "align_corners": False, "upsample": ("x1", "x2", "x4")[a.doublings]},
            "channels": a.head >> a.doublings,
        },
        **{name: _COMPUTED[name] for name in ("use_disks", "norm_radius", "with_prev_mask", "random_split")},
    }
    if phrase:
        values["phrase_encoder_params"] = {"enocder_name": "ViT-B/32", "embedding_dim": 512, "out_dim": a.width}
    base, level, both = (
        "is_plainvit_model.PlainVitModel",
        "is_plainvit_graco_model_lora.PlainVitModel_lora",
        "is_plainvit_graco_two_signal_model_lora.PhraseCLIPGraCoModel_lora",
    )
    return {
        "class": f"isegm.model.{both if phrase else level if adapted else base}",
        "params": {name: {"type": "builtin", "value": v, "specified": True} for name, v in values.items()},
    }


def _of_adapter(name: str) -> bool:
    return bool(_LORA.fullmatch(name)) or name.startswith(("backbone.gra_embed.", "phrase_encoder."))


def _params(config: dict[str, Any] | None) -> dict[str, Any]:
    params = (config or {}).get("params")
    found = params.items() if isinstance(params, dict) else ()
    return {name: param["value"] for name, param in found if isinstance(param, dict) and "value" in param}


def _entry(params: dict[str, Any], group: str, name: str) -> Any:
    values = params.get(group)
    return values.get(name) if isinstance(values, dict) else None


def _is_spare(name: str, architecture: Architecture) -> bool:
    """Say whether a parameter belongs to a doubling that this head does not do; early checkpoints have none."""
    return name.startswith(("head.up_conv1.", "head.up_conv2.")[architecture.doublings :])


def _published_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in published(_network_shapes(architecture)).items()}


def _network_shapes(architecture: Architecture) -> dict[str, Tensor]:
    """Return the network's tensors without values."""
    from model.graco.network import SimpleClick  # brings timm, which serving can do without

    with torch.device("meta"):
        return SimpleClick(architecture).state_dict()


def _adapter_shapes(a: Architecture, rank: int, *, phrase: bool, text: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {LEVEL_EMBEDDING: (LEVELS, a.width)}
    for block in range(a.depth):
        for suffix in ("", "2") if phrase else ("",):
            layer = f"backbone.blocks.{block}.attn.qkv.lora_"
            shapes |= {f"{layer}A{suffix}": (2 * rank, a.width), f"{layer}B{suffix}": (2 * a.width, rank)}
    return shapes | ({PHRASE_WEIGHT: (a.width, text), PHRASE_BIAS: (a.width,)} if phrase else {})


def _text_width(tensors: dict[str, Tensor]) -> int:
    return tensors[PHRASE_WEIGHT].shape[-1] if PHRASE_WEIGHT in tensors and tensors[PHRASE_WEIGHT].ndim == 2 else 512


def _compare(
    tensors: dict[str, Tensor],
    expected: dict[str, tuple[int, ...]],
    what: str,
    *,
    may_miss: Iterable[str] = (),
    may_have: Iterable[str] = (),
) -> None:
    """Refuse tensors that are not as expected, in one sentence that names what is missing, left over and misshapen."""
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = {
        "missing": sorted(expected.keys() - tensors.keys() - set(may_miss)),
        "left over": sorted(repr(name)[1:-1][:100] for name in tensors.keys() - expected.keys() - set(may_have)),
        "of another shape": misshapen,
        "not in fp32, fp16 or bf16": [n for n, v in tensors.items() if v.dtype not in _DTYPES.values()],
    }
    said = [
        f"{len(names)} {problem} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if said:
        raise Refusal(f"these are not the tensors of {what}: {'; '.join(said)}; import the checkpoint as published")
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise Refusal(
            f"{len(bad)} tensors hold values that are not finite ({', '.join(bad[:5])}); the training that wrote them "
            "went wrong: import an earlier checkpoint of it"
        )
