"""record, import, fingerprint: what the routers of a model do."""

from __future__ import annotations

import argparse
import json

from compress_commands.flags import add_checkpoint, add_config, add_output, say
from compress_commands.inputs import data_batches, device_and_dtype, settings, tokenizer_of


def record_flags(p: argparse.ArgumentParser) -> None:
    """routing statistics of texts and conversations, one layer in memory at a time"""
    add_checkpoint(p)
    add_config(p)
    add_record(p)
    add_output(p, "STATS.safetensors")


def add_record(p: argparse.ArgumentParser) -> None:
    """Flags that stand in for fields of RecordConfig; not given is None."""
    p.add_argument("--data", metavar="SOURCE[,...]", help="python, a .txt or .jsonl file, a folder, or a hub name")
    p.add_argument("--tokens", type=int, metavar="N", help="tokens to read (default: 100,000)")
    p.add_argument("--seq-len", type=int, metavar="S", help="tokens a row (default: 512)")
    p.add_argument("--batch-size", type=int, metavar="B", help="rows at a time (default: 4)")
    p.add_argument("--domain", metavar="NAME", help="what the text is, in a word (default: its name)")
    p.add_argument("--sample", type=int, metavar="N", help="also keep N tokens' inputs, for reconstruction and merging")
    p.add_argument(
        "--generate", action="store_true", default=None, help="let the model answer each row, and record that too"
    )
    p.add_argument("--new-tokens", type=int, metavar="N", help="with --generate: length of an answer (default: 128)")


def record(args: argparse.Namespace) -> int:
    from xmoe.errors import ConfigError
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    recipe = settings(args).record
    if not recipe.data:
        raise ConfigError(
            "--data is missing: python, a .txt or .jsonl file, a folder, a hub name, or several by commas"
        )
    stats = recorded(args, recipe)
    stats.save(args.output, args.overwrite, args.line)
    never = len(stats.never_routed())
    result = {"output": args.output, "tokens": int(stats.tokens), "layers": stats.num_layers, "never_routed": never}
    say(args, result, f"wrote {args.output}: {stats.tokens:,.0f} tokens; {never} experts were never routed to")
    return 0


def recorded(args: argparse.Namespace, recipe):
    """Statistics of what the recipe's `record` section names, one layer in memory at a time unless answers are wanted."""
    from xmoe.checkpoint.weights import load
    from xmoe.compression.calibration import with_answers
    from xmoe.compression.routing import record_checkpoint, record_routing

    device, dtype = device_and_dtype(args)
    options = {"domain": recipe.domain or recipe.data, "sample": recipe.sample, "seed": args.seed}
    checkpoint, tokenizer = tokenizer_of(args.checkpoint)
    text = data_batches(recipe, tokenizer, checkpoint.folder, prompts=recipe.generate)
    if not recipe.generate:
        return record_checkpoint(checkpoint, text, device=device, dtype=dtype, **options)
    model, _ = load(args.checkpoint, device, dtype)
    ends = [tokenizer.special("<|return|>"), tokenizer.special("<|call|>"), tokenizer.eos_id]
    ends = [i for i in ends if i is not None]
    return record_routing(model, with_answers(model, text, recipe.new_tokens, args.seed, ends), **options)


def import_flags(p: argparse.ArgumentParser) -> None:
    """the same from published activation summaries"""
    p.add_argument("--format", required=True, choices=["fingerprint"], help="what the folder holds")
    p.add_argument("--data", required=True, metavar="DIR", help="the folder with map.json, or the one above it")
    p.add_argument("--domain", required=True, metavar="NAME", help="of domains.json, a dataset/category, or all")
    add_output(p, "STATS.safetensors")


def import_summaries(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xmoe.compression.fingerprint import import_fingerprint

    folder = Path(args.data)
    categories = None if args.domain == "all" else [args.domain]
    if (folder / "domains.json").is_file():
        categories = json.loads((folder / "domains.json").read_text()).get(args.domain, categories)
    inner = folder / "data" if not (folder / "map.json").is_file() else folder
    stats = import_fingerprint(inner, categories, domain=args.domain)
    stats.save(args.output, args.overwrite, args.line)
    say(
        args,
        {"output": args.output, "layers": stats.num_layers},
        f"wrote {args.output}: how often each expert is chosen in {args.domain}",
    )
    return 0


def fingerprint_flags(p: argparse.ArgumentParser) -> None:
    """which experts each domain uses: rankings, overlap, coverage and token-level traces, as data for a report page"""
    p.add_argument("--stats", metavar="STATS[,...]", help="one file a domain, by `record --domain` or `import`")
    p.add_argument("--top", default="8,16,20,24", metavar="N,...", help="experts of a ranking (default: 8,16,20,24)")
    add_checkpoint(p, required=False)
    p.add_argument("--text", action="append", default=[], metavar="TEXT", help="trace this, token by token; repeatable")
    add_output(p, "FILE.json")


def fingerprint(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.fingerprint import report, trace_text
    from xmoe.compression.routing import RoutingStats
    from xmoe.errors import ConfigError
    from xmoe.outputs import check_free, new_file

    check_free(args.output, args.overwrite)
    if bool(args.text) != bool(args.checkpoint) or not (args.stats or args.text):
        raise ConfigError("give --stats STATS[,...], or --checkpoint with --text to trace, or both")
    if not all(part.isdigit() and int(part) for part in args.top.split(",")):
        raise ConfigError(f"--top {args.top}: expected counts of experts, such as 8,16")
    content = {"command": args.line}
    if args.stats:
        stats = [RoutingStats.load(part) for part in args.stats.split(",") if part]
        content |= report(stats, [int(part) for part in args.top.split(",")])
    if args.text:
        device, dtype = device_and_dtype(args)
        model, tokenizer = load(args.checkpoint, device, dtype)
        content["traces"] = [trace_text(model, tokenizer, text) for text in args.text]
    with new_file(args.output, args.overwrite) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = f"wrote {args.output}: {len(content.get('rankings', {}))} domains, {len(content.get('traces', []))} traces"
    for top, table in content.get("overlap", {}).items():
        pairs = [(a, b, share) for a, row in table.items() for b, share in row.items() if a < b]
        text += "".join(f"\n  top {top}: {a} and {b} share {share:.0%} of their experts" for a, b, share in pairs)
    say(args, {"output": args.output, **content}, text)
    return 0
