"""Our scorer beside the lm-evaluation-harness's HFLM: same weights, same rows, same machine, one run.

Both get the same request strings and a small GPT-OSS with random fp32 weights, each in a process of its own so that peak
memory is its own. Tokenizing counts, loading does not. The predictions must be equal, or the run fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from xmoe import command
from xmoe.errors import ConfigError
from xmoe.outputs import new_file

EXAMPLE = "python benchmarks/scoring.py --data-dir data --output benchmarks/results/scoring.json"
OURS = "xmoe"
SHAPE = {  # a tiny GPT-OSS: every feature of the large one, small enough for a CPU
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_local_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 128,
    "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.05,
}  # fmt: skip
MAX_LENGTH = 2048


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where the two engines disagree on a prediction."""
    p = command.parser(__doc__.splitlines()[0], EXAMPLE)
    p.add_argument("--data-dir", metavar="DIR", required=True, help="holds mmlu/ and hellaswag/")
    p.add_argument("--mmlu-questions", type=int, default=40, metavar="N", help="of each subject (default: 40)")
    p.add_argument("--subjects", type=lambda s: s.split(","), metavar="NAME[,...]", help="of MMLU (default: four)",
                   default=["astronomy", "college_biology", "machine_learning", "nutrition"])  # fmt: skip
    p.add_argument("--hellaswag-rows", type=int, default=100, metavar="N", help="default: 100")
    p.add_argument("--batch-sizes", type=_numbers, default=[1, 8], metavar="B[,...]", help="of HFLM (default: 1,8)")
    p.add_argument("--our-batch-sizes", type=_numbers, default=[8], metavar="B[,...]", help="default: 8")
    p.add_argument("--rounds", type=int, default=1, metavar="R", help="of all engines in turn; the best of each counts")
    p.add_argument("--output", metavar="FILE.json", help="where the readings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    p.add_argument(
        "--measure", nargs=3, metavar=("ENGINE", "BATCH", "FOLDER"), help="one engine, as the child of a run"
    )
    args = p.parse_args(argv)
    if args.measure:
        engine, batch, folder = args.measure
        return _measure(engine, int(batch), Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        _prepare(args, Path(folder))
        runs = [(OURS, b) for b in args.our_batch_sizes] + [("HFLM", b) for b in args.batch_sizes]
        rounds = [[_in_child(engine, batch, Path(folder)) for engine, batch in runs] for _ in range(args.rounds)]
        readings = [_best(same) for same in zip(*rounds)]
    agreed = [_against(readings[0], other) for other in readings]
    print(_table(readings, agreed))
    if args.output:
        kept = [{k: v for k, v in r.items() if k != "answers"} for r in readings]
        with new_file(args.output, args.overwrite) as partial:
            found = {"environment": _environment(), "shape": SHAPE, "readings": kept, "agreement": agreed}
            partial.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(a["predictions_differ"] == 0 for tasks in agreed for a in tasks.values()) else 1


def _environment() -> dict:
    """Machine and versions, the harness's among them."""
    from importlib.metadata import version

    import torch

    from evaluation.results import describe_environment

    versions = {name: version(name) for name in ("lm-eval", "transformers")}
    return describe_environment(torch.device("cpu"), torch.float32) | versions


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _prepare(args, folder: Path) -> None:
    """Write requests, a tokenizer trained on their text, and the weights, for both engines to read."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from evaluation.runner import load_examples
    from evaluation.settings import EvalConfig
    from evaluation.tasks import find
    from xmoe.data.tokenizer import Tokenizer

    tasks = {}
    for name, limit in (("mmlu", args.mmlu_questions), ("hellaswag", args.hellaswag_rows)):
        subjects = tuple(args.subjects) if name == "mmlu" else ()
        config = EvalConfig(benchmark=(name,), data_dir=args.data_dir, limit=limit, subjects=subjects)
        examples, _ = load_examples(find(name), config)
        tasks[name] = [[list(request) for request in e.requests] for e in examples]
    (folder / "requests.json").write_text(json.dumps(tasks))
    texts = [request[0] + request[1] for rows in tasks.values() for row in rows for request in row]
    tokenizer = Tokenizer.train(texts, SHAPE["vocab_size"])
    tokenizer.save(folder)
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "sinks" in name:  # they start at zero and would hide a mistake
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)


def _in_child(engine: str, batch: int, folder: Path) -> dict:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    arguments = [sys.executable, __file__, "--data-dir", "-", "--measure", engine, str(batch), str(folder)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"{engine} at batch {batch} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    return json.loads((folder / f"{engine}-{batch}.json").read_text())


def _best(readings: tuple[dict, ...]) -> dict:
    """The shortest time of each task over the rounds, and the largest memory: other work on a machine only adds time."""
    seconds = {task: min(r["seconds"][task] for r in readings) for task in readings[0]["seconds"]}
    every = {task: [r["seconds"][task] for r in readings] for task in seconds}
    peak = max(r["peak_bytes"] for r in readings)
    return readings[0] | {"seconds": seconds, "seconds_of_rounds": every, "peak_bytes": peak}


def _measure(engine: str, batch: int, folder: Path) -> int:
    """Score all tasks with one engine and write seconds, peak memory and answers."""
    score = _ours(folder, batch) if engine == OURS else _theirs(folder, batch)
    tasks = json.loads((folder / "requests.json").read_text())
    score([request for rows in tasks.values() for request in rows[0]])  # warm up
    loaded = _peak_bytes()
    reading = {"engine": engine, "batch": batch, "seconds": {}, "rows": {}, "answers": {}}
    for name, rows in tasks.items():
        flat = [request for row in rows for request in row]
        start = time.perf_counter()
        answers = score(flat)
        reading["seconds"][name] = time.perf_counter() - start
        reading["rows"][name] = len(rows)
        numbers = iter(answers)
        reading["answers"][name] = [[next(numbers) for _ in row] for row in rows]
    reading |= {"peak_bytes": _peak_bytes(), "peak_bytes_loaded": loaded}
    (folder / f"{engine}-{batch}.json").write_text(json.dumps(reading))
    return 0


def _ours(folder: Path, batch: int):
    import xmoe
    from evaluation.scoring import Scorer
    from evaluation.task import Request

    model, tokenizer = xmoe.load(folder, dtype="float32")
    scorer = Scorer(model, tokenizer, batch_size=batch, max_length=MAX_LENGTH)
    return lambda requests: [a.loglikelihood for a in scorer.loglikelihoods([Request(*r) for r in requests])]


def _theirs(folder: Path, batch: int):
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GptOssForCausalLM, PreTrainedTokenizerFast

    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    engine = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=MAX_LENGTH, device="cpu")

    def score(requests: list) -> list[float]:
        asked = [Instance("loglikelihood", {}, tuple(request), i) for i, request in enumerate(requests)]
        return [value for value, _ in engine.loglikelihood(asked, disable_tqdm=True)]

    return score


def _peak_bytes() -> int:
    import torch

    from xmoe.device import peak_memory

    return peak_memory(torch.device("cpu"))


def _against(ours: dict, other: dict) -> dict[str, dict[str, float]]:
    """Largest difference of log-likelihoods, and the number of rows whose likeliest choice differs."""
    found = {}
    for name, rows in ours["answers"].items():
        pairs = list(zip(rows, other["answers"][name]))
        found[name] = {
            "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b)),
            "predictions_differ": sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs),
        }
    return found


def _table(readings: list[dict], agreed: list[dict]) -> str:
    """Rows a second, the ratio to HFLM's best batch size, and peak memory."""
    tasks = list(readings[0]["rows"])
    best = {t: min(r["seconds"][t] for r in readings if r["engine"] != OURS) for t in tasks}
    head = "".join(f" {t} rows/s | to HFLM's best | largest difference | predictions differ |" for t in tasks)
    lines = ["| engine | batch |" + head + " peak GB |", "|---|--:|" + "--:|--:|--:|--:|" * len(tasks) + "--:|"]
    for reading, agreement in zip(readings, agreed):
        cells = "".join(
            f" {reading['rows'][t] / reading['seconds'][t]:.2f} | {best[t] / reading['seconds'][t]:.2f}x |"
            f" {agreement[t]['largest_difference']:.1e} | {agreement[t]['predictions_differ']} |"
            for t in tasks
        )
        lines.append(f"| {reading['engine']} | {reading['batch']} |{cells} {reading['peak_bytes'] / 1e9:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
