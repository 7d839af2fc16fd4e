"""How many experts each layer has by the word of a config.json, in all the ways seen."""

from __future__ import annotations

from typing import Any

from xmoe.checkpoint.config_keys import Keys
from xmoe.errors import CheckpointError


def stated_experts(keys: Keys, layers: int) -> list[int] | None:
    """Experts of each layer as the file says, in any of the ways seen; None where it says nothing."""
    own = _layers_of_their_own(keys, layers)
    count = keys.find("num_local_experts", "num_experts", default=None if len(own) < layers else [0] * layers)
    if isinstance(count, int) and not isinstance(count, bool):
        count = [count] * layers
    if count is not None and not (isinstance(count, list) and all(type(n) is int for n in count)):
        raise CheckpointError(f"{keys.file}: num_experts is {str(count)[:60]!r}; expected a whole number")
    if count is not None and len(count) != layers:
        raise CheckpointError(f"{keys.file}: num_experts lists {len(count)} layers; expected {layers}")
    return None if count is None else [own.get(layer, number) for layer, number in enumerate(count)]


def _layers_of_their_own(keys: Keys, layers: int) -> dict[int, int]:
    """Layer -> experts, where a layer has an entry of its own that says so: the two ways pruned models are written.

    transformers 5 has `per_layer_config` {"3": {"num_local_experts": 16}} for the layers that differ; NVIDIA's Puzzle
    has a list `block_configs` with `ffn.moe.num_local_experts` for every layer. In both, a layer's entry goes before the
    number for all. An entry that changes anything but the number of experts is refused: the model has no words for it.
    """
    per_layer, blocks = keys.find("per_layer_config", default={}), keys.find("block_configs", default=[])
    experts: dict[int, int] = {}
    if not isinstance(per_layer, dict) or not isinstance(blocks, list) or len(blocks) not in (0, layers):
        raise CheckpointError(
            f"{keys.file}: expected per_layer_config as an object by layer, and block_configs as a list of {layers}"
        )

    def entry(name: str, layer: int, content: Any, same: dict[str, Any]) -> None:
        """Take the experts of one layer; everything else it says must be what `same` or the whole model says."""
        if not 0 <= layer < layers or not isinstance(content, dict):
            raise CheckpointError(f"{keys.file}: {name} has no sense for layer {layer} of {layers}")
        for key, value in content.items():
            if key in ("num_local_experts", "num_experts"):
                if type(value) is not int or experts.setdefault(layer, value) != value:
                    raise CheckpointError(f"{keys.file}: {name} says {str(value)[:60]!r} experts in layer {layer}")
            elif value is not None and value != same.get(key, keys.content.get(key)):
                raise CheckpointError(
                    f"{keys.file}: {name} gives layer {layer} {key} {str(value)[:60]!r}; only the number of experts may "
                    "differ by layer"
                )

    for key, content in per_layer.items():
        entry("per_layer_config", int(key) if key.isdecimal() else -1, content, {})
    whole = {"no_op": False, "replace_with_linear": False, "weights_precision": "bf16"}
    for layer, block in enumerate(blocks):
        parts = [block.get(name) for name in ("attention", "ffn")] if isinstance(block, dict) else []
        moe = parts[1].get("moe") if len(parts) == 2 and isinstance(parts[1], dict) else None
        if not isinstance(moe, dict):
            raise CheckpointError(
                f"{keys.file}: block_configs has no ffn.moe in layer {layer}; expected a GPT-OSS block"
            )
        size = {"expert_intermediate_dim": keys.content.get("intermediate_size")}
        entry("block_configs", layer, parts[0], whole)
        entry("block_configs", layer, {k: v for k, v in parts[1].items() if k != "moe"}, whole)
        # GPT-OSS has no shared expert; the width that Puzzle notes for one means nothing.
        entry("block_configs", layer, {k: v for k, v in moe.items() if k != "shared_expert_intermediate_dim"}, size)
    return experts
