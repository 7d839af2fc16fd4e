"""What is in a checkpoint: parameters, experts, formats, bytes, and the memory it needs at a context length. Reads no weights."""

from __future__ import annotations

import json
from typing import Any

from xmoe import command
from xmoe.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python scripts/describe.py --checkpoint checkpoints/quickstart --context-lengths 2048")
    command.add_common(p)
    p.add_argument("--tensors", action="store_true", help="list every tensor: dtype, shape, bytes, file")
    p.add_argument(
        "--context-lengths",
        metavar="N,...",
        help="tokens to plan the memory for (default: 4096 and the model's longest)",
    )
    args = p.parse_args(argv)

    # Imported late, so that --help and a wrong flag answer at once.
    from xmoe.checkpoint.opened import Checkpoint
    from xmoe.checkpoint.sidecars import load_tokenizer
    from xmoe.checkpoint.weights import wanted_dtype

    wanted_dtype(args.dtype)  # both for their refusals alone
    checkpoint = Checkpoint(args.checkpoint)
    load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
    content = describe(
        checkpoint, _lengths(args.context_lengths, checkpoint.config.max_position_embeddings), args.dtype
    )
    if args.tensors:
        content["tensors"] = [
            {
                "name": info.name,
                "dtype": str(info.dtype).removeprefix("torch."),
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "file": info.file.name,
            }
            for info in checkpoint.reader.tensors.values()
        ]
    print(json.dumps(content) if args.json else as_text(content))
    return 0


def describe(checkpoint, context_lengths: list[int], dtype: str = "auto") -> dict[str, Any]:
    """Everything the command prints, as one JSON object; `dtype` is that of the KV cache ("auto": bfloat16)."""
    import torch

    from xmoe.generation.cache import KVCache

    config, reader = checkpoint.config, checkpoint.reader
    names = [n for n in checkpoint if n.startswith("blocks.") and ".moe.experts." in n]
    expert_bytes = sum(reader[stored].nbytes for n in names for stored in checkpoint.stored_names(n))
    kv_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    total, active = checkpoint.parameter_counts
    memory = []
    for length in context_lengths:
        cache = KVCache.planned_bytes(config, length, dtype=kv_dtype)
        memory.append({"context_length": length, "kv_cache_bytes": cache, "total_bytes": reader.total_bytes + cache})
    return {
        "checkpoint": str(checkpoint.folder),
        "layout": checkpoint.layout.name,
        "files": len(reader.files),
        "tensor_count": len(reader),
        "bytes": reader.total_bytes,
        "expert_bytes": expert_bytes,
        "other_bytes": reader.total_bytes - expert_bytes,
        "other_dtype": str(checkpoint.tensor_dtype()).removeprefix("torch."),
        "expert_formats": checkpoint.formats,
        "expert_ranks": sorted({rank for n in names for rank in checkpoint.ranks(n)}),
        "parameters": total,
        "active_parameters": active,
        "layers": config.num_hidden_layers,
        "sliding_layers": config.layer_types.count("sliding_attention"),
        "sliding_window": config.sliding_window,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "experts_per_layer": [config.experts_in_layer(i) for i in range(config.num_hidden_layers)],
        "experts_per_token": config.num_experts_per_tok,
        "max_context_length": config.max_position_embeddings,
        "kv_cache_dtype": str(kv_dtype).removeprefix("torch."),
        "memory": memory,
    }


def as_text(content: dict[str, Any]) -> str:
    """The same for people."""
    c, counts = content, content["experts_per_layer"]
    per_layer = (
        f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)} ({', '.join(map(str, counts))})"
    )
    formats = " and ".join(c["expert_formats"])
    if ranks := c["expert_ranks"]:
        formats += f" (rank {' and '.join(map(str, ranks))})"
    full = c["layers"] - c["sliding_layers"]
    rows = [
        ("checkpoint", f"{c['checkpoint']} ({c['layout']} layout, {c['files']} files, {c['tensor_count']} tensors)"),
        ("parameters", f"{c['parameters']:,} in all, {c['active_parameters']:,} active a token"),
        ("experts", f"{per_layer} a layer, {c['experts_per_token']} a token, in {formats}"),
        ("layers", f"{c['layers']}: {c['sliding_layers']} see {c['sliding_window']} tokens back, {full} see all"),
        ("widths", f"hidden {c['hidden_size']}, expert {c['intermediate_size']}, vocabulary {c['vocab_size']:,}"),
        (
            "bytes",
            f"{_size(c['bytes'])}: experts {_size(c['expert_bytes'])}, rest {_size(c['other_bytes'])} ({c['other_dtype']})",
        ),
    ]
    for plan in c["memory"]:
        rows.append(
            (
                "memory",
                f"{_size(plan['total_bytes'])} at {plan['context_length']:,} tokens "
                f"({_size(plan['kv_cache_bytes'])} of it keys and values in {c['kv_cache_dtype']})",
            )
        )
    lines = [f"{name:<11} {value}" for name, value in rows]
    for t in c.get("tensors", []):
        lines.append(
            f"  {t['name']:<60} {t['dtype']:<9} {'x'.join(map(str, t['shape'])):<20} {t['bytes']:>14,}  {t['file']}"
        )
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def _lengths(text: str | None, longest: int) -> list[int]:
    if text is None:
        return sorted({min(4096, longest), longest})
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--context-lengths is {text!r}; expected whole numbers such as 4096,131072") from None
    if beyond := [n for n in lengths if not 1 <= n <= longest]:
        raise ConfigError(f"--context-lengths: {beyond[0]} is not between 1 and {longest}, the model's longest context")
    return lengths


if __name__ == "__main__":
    command.run(main)
