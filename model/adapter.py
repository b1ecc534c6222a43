"""LoRA adapters: attach one to a network for training, save what was trained, load it for serving.

An adapter is one safetensors file: for each branch its LoRA matrices (of Q and V, and more), and the small tensors
trained beside them, with a card (JSON) in its metadata. Serving does not run LoRA beside the weights: for each set of
branches a request may ask for, the sums W + scale * B A are made once at loading, so that switching writes to nothing
that another thread reads, and costs no time. peft is needed to train; it is imported only then.

Sources: LoRA (arXiv 2106.09685); peft's names of tensors; GraCo (arXiv 2405.00587) for rank 8, on Q and V, and a branch
for each control signal.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.files import save_tensors
from model.types import Refusal

Q_AND_V = ("q_proj", "v_proj")
"""What GraCo's LoRA is added to."""
ENCODER = "encoder"
"""The branch of an adapter of `light` that moves the encoder's tail (`model.light.tail`); on wherever it answers."""
_LORA, _PLAIN = "lora", "plain"  # first part of a tensor's name in the file
_FORMATS = (1, 2)
"""2 has the branch `ENCODER`, which readers of 1 would leave out unseen."""
_SMALL = 10_000  # values of a tensor up to which it is kept in fp32


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFile:
    """What an adapter file holds."""

    card: dict[str, Any]  # base, rank, alpha, branches and whatever the training wrote about itself
    plain: dict[str, Tensor]  # tensors that take the place of the network's own
    lora: dict[str, dict[str, Tensor]]  # branch to LoRA matrices, by peft's names

    def deltas(self, branches: Sequence[str]) -> dict[str, Tensor]:
        """Return what is added to each weight when `branches` are on: name of the weight to a tensor of its shape."""
        scale = self.card["alpha"] / self.card["rank"]
        found: dict[str, Tensor] = {}
        for branch in branches:
            tensors = self.lora[branch]
            for name, a in tensors.items():
                if name.endswith(".lora_A.weight"):
                    module = name.removesuffix(".lora_A.weight")
                    b = tensors[f"{module}.lora_B.weight"]
                    delta = scale * (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
                    weight = f"{module}.weight"
                    found[weight] = found[weight] + delta if weight in found else delta
        return found


def attach(network: nn.Module, branch: str, *, rank: int, alpha: int, targets: Sequence[str] = Q_AND_V) -> None:
    """Add a LoRA branch to the layers of `network` named `targets`, in place; only its matrices will train.

    The branch is on afterwards, as are those attached before.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second branch is what we want
        inject_adapter_in_model(config, network, adapter_name=branch)
    own = f".{branch}."
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name and own in name)


def switch_on(network: nn.Module, branches: Sequence[str]) -> None:
    """Let exactly these branches take part in the next passes of a network in training; gradients stay as they are."""
    from peft.tuners.lora import LoraLayer

    for module in network.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = list(branches)  # set_adapter would also freeze and thaw


def lora_state(network: nn.Module, branch: str) -> dict[str, Tensor]:
    """Return the matrices of a branch by peft's names, fp32, on the CPU."""
    own = f".{branch}."
    return {
        name.replace(own, "."): value.detach().float().cpu().clone()
        for name, value in network.state_dict().items()
        if "lora_" in name and own in name
    }


def load_lora(network: nn.Module, branch: str, tensors: dict[str, Tensor]) -> None:
    """Set the matrices of an attached branch.

    Raises:
        Refusal: they are not the branch's.
    """
    own = {name.replace(".weight", f".{branch}.weight"): value for name, value in tensors.items()}
    result = network.load_state_dict(own, strict=False)
    expected = set(lora_state(network, branch))
    if result.unexpected_keys or set(tensors) != expected:
        raise Refusal(f"these matrices do not fit the branch {branch!r}: {sorted(set(tensors) ^ expected)[:4]}")


def write_adapter(
    path: Path,
    *,
    card: dict[str, Any],
    plain: dict[str, Tensor],
    lora: dict[str, dict[str, Tensor]],
    exact: bool = False,
) -> None:
    """Write an adapter file; it appears whole or not at all. Large plain tensors are kept in fp16, all else in fp32.

    Args:
        path: the file to write.
        card: JSON-able; `base` (digest of the base weights), `rank` and `alpha` must be in it.
        plain: tensors that take the place of the network's own.
        lora: branch to matrices, as `lora_state` returns them.
        exact: keep large plain tensors as they are, too.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {f"{_PLAIN}.{name}": value for name, value in plain.items()}
    for branch, matrices in lora.items():
        tensors |= {f"{_LORA}.{branch}.{name}": value for name, value in matrices.items()}
    card = card | {"format": _FORMATS[ENCODER in lora], "branches": sorted(lora)}
    draft = path.with_name(f".{path.name}.draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    large = {k for k, v in tensors.items() if k.startswith(f"{_PLAIN}.") and v.ndim > 1 and v.numel() > _SMALL}
    halved = set() if exact else large
    compact = {k: v.detach().cpu().half() if k in halved else v.detach().cpu() for k, v in tensors.items()}
    save_tensors(draft, {k: v.contiguous() for k, v in compact.items()}, {"card": json.dumps(card)})
    draft.chmod(0o644)  # safetensors writes for its owner alone
    draft.replace(path)


def read_adapter(path: Path, *, base: str | None = None) -> AdapterFile:
    """Read an adapter file, values as fp32.

    Args:
        path: the file.
        base: digest of the base weights it has to fit; None: any.

    Raises:
        Refusal: it is missing, damaged, holds values that are not finite, or fits another base.
    """
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["card"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        if card["format"] not in _FORMATS:
            known = " and ".join(map(str, _FORMATS))
            raise Refusal(f"adapter {path} has format {card['format']}; this version reads formats {known}")
        fits, _ = str(card["base"]), card["alpha"] / card["rank"]
        lora: dict[str, dict[str, Tensor]] = {branch: {} for branch in card["branches"]}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"adapter {path} cannot be read ({error!r}); restore or train it anew") from error
    if base is not None and fits != base:
        raise Refusal(f"adapter {path} was trained on base {fits[:12]}, but base {base[:12]} is loaded; use that base")
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise Refusal(f"adapter {path} holds values that are not finite in {bad[0]}; train it anew")
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == _PLAIN:
            plain[rest] = value
            continue
        branch, _, matrix = rest.partition(".")
        if kind != _LORA or branch not in lora:
            raise Refusal(f"adapter {path} holds the tensor {name}, which belongs to nothing")
        lora[branch][matrix] = value
    return AdapterFile(card, plain, lora)
