"""Our scores beside the lm-evaluation-harness's own engine (HFLM over transformers): same weights, same rows, fp32.

The harness builds its prompts with its own tasks and scores them with its own model; we build and score ours. Compared row
by row: the strings sent, log-likelihoods, predictions, generated texts, and every metric of a row. Exit 1 where strings,
predictions, texts or metrics differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xmoe import command
from xmoe.errors import CheckpointError
from xmoe.outputs import new_file

EXAMPLE = "python benchmarks/harness_parity.py --checkpoint DIR --data-dir data --benchmark hellaswag,gsm8k --rows 200"
DEFAULT = ("hellaswag", "lambada", "winogrande", "arc_easy", "arc_challenge", "mmlu/astronomy", "wikitext", "gsm8k")
ROW_METRICS = {  # ours -> the harness's filter and metric
    "acc": ("none", "acc"), "acc_norm": ("none", "acc_norm"),
    "exact_match": ("strict-match", "exact_match"), "flexible_match": ("flexible-extract", "exact_match"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__.splitlines()[0], EXAMPLE)
    p.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="a folder in the hf-bf16 layout, with a tokenizer"
    )
    p.add_argument("--data-dir", metavar="DIR", required=True, help="as of evaluation/benchmark.py")
    p.add_argument("--benchmark", type=lambda s: s.split(","), default=DEFAULT, metavar="NAME[,...]",
                   help=f"mmlu/SUBJECT for MMLU (default: {','.join(DEFAULT)})")  # fmt: skip
    p.add_argument("--rows", type=int, default=200, metavar="N", help="the first N of each (default: 200)")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of GSM8K (default: 256, its own)")
    p.add_argument("--max-length", type=int, default=2048, metavar="N", help="default: 2048")
    p.add_argument("--batch-size", type=int, default=8, metavar="B", help="of both (default: 8)")
    p.add_argument("--output", metavar="FILE.json", help="where the findings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    args = p.parse_args(argv)

    import xmoe

    theirs = _their_engine(args)
    ours = xmoe.load(args.checkpoint, dtype="float32")
    found = {}
    for name in args.benchmark:
        found[name] = _compare(name, theirs, ours, args)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if not any(v for one in found.values() for k, v in one.items() if k.endswith("differ")) else 1


def _their_engine(args):
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GptOssForCausalLM, PreTrainedTokenizerFast

    file = Path(args.checkpoint) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{args.checkpoint} has no tokenizer.json; expected a folder that transformers can open")
    model = GptOssForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=args.max_length, device="cpu"
    )


def _compare(name: str, engine, ours, args) -> dict:
    import lm_eval

    from evaluation import evaluate
    from evaluation.harness import task_on_files

    own, _, subject = name.partition("/")
    limit = None if own == "wikitext" else args.rows
    task = task_on_files(name, args.data_dir, args.max_new_tokens if own == "gsm8k" else None)
    said = lm_eval.evaluate(lm=engine, task_dict={name: task}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples: dict[int, dict[str, dict]] = {}
    for sample in said["samples"][name]:
        samples.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    rows: list[tuple] = []
    evaluate(
        *ours, own, data_dir=args.data_dir, limit=limit, first=True, subjects=(subject,) if subject else (),
        max_length=args.max_length, batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens if own == "gsm8k" else None,
        on_example=lambda benchmark, example, answers, values: rows.append((example, answers, values)),
    )  # fmt: skip
    total = {"rows": len(rows), "requests": 0, "largest_difference": 0.0, "largest_relative_difference": 0.0}
    total |= dict.fromkeys(("strings_differ", "predictions_differ", "texts_differ", "row_metrics_differ"), 0)
    for number, row in enumerate(rows):
        for key, value in _compare_row(samples[number], *row).items():
            total[key] = max(total[key], value) if key.startswith("largest") else total[key] + value
    return total


def _compare_row(samples: dict[str, dict], example, answers, values) -> dict[str, float]:
    first = next(iter(samples.values()))
    sent = [tuple(arguments) for arguments in first["arguments"]]
    found = {"requests": len(example.requests)}
    metrics = [samples[f][m] != values[ours] for ours, (f, m) in ROW_METRICS.items() if ours in values]
    found["row_metrics_differ"] = sum(map(bool, metrics))
    if answers[0].text or not answers[0].loglikelihood:  # generated
        found["strings_differ"] = sent[0][0] != example.requests[0].context
        found["texts_differ"] = first["resps"][0][0] != answers[0].text
        return found
    if example.requests[0].context or len(example.requests) > 1:
        found["strings_differ"] = sent != [tuple(r) for r in example.requests]
    else:  # a whole page
        found["strings_differ"] = sent[0][0] != example.requests[0].continuation
    theirs = [float(r[0][0] if isinstance(r[0], (list, tuple)) else r[0]) for r in first["resps"]]
    differences = [abs(x - a.loglikelihood) for x, a in zip(theirs, answers)]
    found["largest_difference"] = max(differences)
    found["largest_relative_difference"] = max(d / max(abs(x), 1.0) for d, x in zip(differences, theirs))
    if "prediction" in values:
        found["predictions_differ"] = theirs.index(max(theirs)) != values["prediction"]
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    command.run(main)
