"""Write a checkpoint in another layout, one tensor at a time; MXFP4 bytes stay as they are wherever both layouts have them.

With --adapter, what was trained beside the checkpoint is added to its weights on the way.
"""

from __future__ import annotations

import json

from xmoe import command


def main(argv: list[str] | None = None) -> int:
    p = command.parser(
        __doc__,
        "python scripts/convert.py --checkpoint openai/gpt-oss-20b --layout native --output checkpoints/gpt-oss-20b",
    )
    command.add_common(p)
    p.add_argument(
        "--layout",
        required=True,
        metavar="native|hf-mxfp4|hf-bf16|openai",
        help="hf-mxfp4 is what transformers, vLLM, llama.cpp and mlx-lm open",
    )
    p.add_argument(
        "--adapter", metavar="DIR", help="merge this adapter of the checkpoint; rounded to MXFP4 where the layout packs"
    )
    p.add_argument("--output", required=True, metavar="DIR", help="the new folder; it appears complete or not at all")
    p.add_argument("--overwrite", action="store_true", help="replace what stands at --output")
    args = p.parse_args(argv)

    # Imported late, so that --help and a wrong flag answer at once.
    from xmoe.checkpoint.adapters import MERGED
    from xmoe.checkpoint.opened import Checkpoint
    from xmoe.checkpoint.weights import convert

    folder = convert(
        args.checkpoint, args.output, args.layout, dtype=args.dtype, overwrite=args.overwrite, adapter=args.adapter
    )
    written = Checkpoint(folder)
    result = {
        "checkpoint": str(args.checkpoint),
        "output": str(folder),
        "layout": written.layout.name,
        "experts": written.formats,
        "tensors": len(written.reader),
        "bytes": written.reader.total_bytes,
    }
    if args.adapter:
        result["merge"] = json.loads((folder / MERGED).read_text(encoding="utf-8"))
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"wrote {folder}: {written.layout.name} layout, {len(written.reader)} tensors, "
            f"{written.reader.total_bytes / 1e9:,.2f} GB, experts in {' and '.join(written.formats)}"
        )
        if args.adapter:
            print(f"merged {args.adapter}; {rounding(result['merge'])}")
    return 0


def rounding(merge: dict) -> str:
    """What going back to MXFP4 did to the adapted experts, in a sentence."""
    error, kept = merge["mxfp4_relative_error"], merge["mxfp4_change_kept"]
    if error is None:
        return "no expert was rounded to MXFP4"
    said = f"rounding to MXFP4 moved the merged experts by {error:.2%} of their length"
    if kept is None:
        return f"{said}; the adapter changes none of them"
    return f"{said} and kept {kept:.1%} of the adapter's change; --adapter beside the checkpoint keeps all of it"


if __name__ == "__main__":
    command.run(main)
