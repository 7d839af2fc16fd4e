"""Speculative decoding: what a pass over several tokens costs, when a drafter pays, and what prompt lookup gains.

Speed must not depend on what a random model happens to say, so the model computes every layer in full and then says what
a script wants: Python source with one name changed throughout (it repeats its prompt), or other source (it does not).
Drafters that ask a model are measured at their very best: draft and model follow one script, so every guess is right.
Plain and speculative runs alternate; the median of their ratios is reported. Exit 1 where the two texts differ.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import statistics
import sys
import time
from pathlib import Path

from xmoe import command
from xmoe.outputs import new_file

EXAMPLE = "python benchmarks/speculative.py --preset ultra_light --output benchmarks/results/speculative.json"
AHEAD = (1, 2, 3, 5, 9)  # tokens of a pass
BEST_CASE_TOKENS = 4  # drafted at a time by a model


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__.splitlines()[0], EXAMPLE)
    p.add_argument("--checkpoint", metavar="DIR|NAME", help="measure on these weights instead of a random model")
    p.add_argument("--preset", default="ultra_light", help="of the random model (default: ultra_light)")
    p.add_argument("--layers", type=int, metavar="N", help="of the random model (default: as the preset says)")
    p.add_argument("--new-tokens", type=int, default=160, metavar="N", help="of each run (default: 160)")
    p.add_argument("--repeat", type=int, default=5, metavar="N", help="pairs of runs (default: 5)")
    p.add_argument("--draft-tokens", type=int, default=8, metavar="N", help="at most this many at a time (default: 8)")
    p.add_argument("--output", metavar="FILE.json", help="where the readings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    command.add_common(p, checkpoint=False)
    args = p.parse_args(argv)

    import torch

    with torch.no_grad():  # and not for good: whoever calls this may train afterwards
        model = _model(args)
        result = {
            "model": args.checkpoint or args.preset,
            "layers": model.config.num_hidden_layers,
            "experts": f"{model.config.num_experts_per_tok} of {model.config.num_experts}",
            "device": str(model.device),
            "dtype": str(model.unembedding.dtype).removeprefix("torch."),
            "passes": _passes(model, args.repeat),
            "prompt_lookup": [_lookup(model, name, args) for name in ("repeats its prompt", "does not repeat")],
            "every_guess_right": _best_cases(model, args),
        }
    print(json.dumps(result) if args.json else _table(result))
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(run["same_text"] for run in result["prompt_lookup"] + result["every_guess_right"]) else 1


def _model(args):
    from xmoe.checkpoint.weights import load
    from xmoe.device import pick_device, pick_dtype
    from xmoe.model.config import preset
    from xmoe.model.transformer import build

    device = pick_device(args.device)
    if args.checkpoint:
        return load(args.checkpoint, device=device, dtype=args.dtype)[0]
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    return build(preset(args.preset, **changes), device, pick_dtype(args.dtype, device), args.seed).eval()


# What passes cost ---------------------------------------------------------------------------------------------------------


def _passes(model, repeat: int) -> dict:
    """Milliseconds of a pass over n tokens after a prompt of 256, and over one token with fewer experts."""
    import torch

    from xmoe.device import synchronize
    from xmoe.generation.cache import KVCache

    vocab = model.config.vocab_size
    cache = KVCache(model.config, reserve=300, rollback=max(AHEAD))
    model.features(torch.randint(0, vocab, (1, 256), device=model.device), cache)

    def once(tokens: int, k: int | None = None) -> float:
        ids = torch.randint(0, vocab, (1, tokens), device=model.device)
        synchronize(model.device)
        start = time.perf_counter()
        model.unembed(model.features(ids, cache, num_experts_per_tok=k).hidden[0]).argmax(-1).tolist()
        seconds = time.perf_counter() - start
        cache.truncate(256)
        return 1000 * seconds

    kinds = [(n, None) for n in AHEAD] + [(1, k) for k in range(1, model.config.num_experts_per_tok)]
    rounds = [[once(*kind) for kind in kinds] for _ in range(10 * repeat + 1)][1:]  # the first one warms up
    medians = [statistics.median(column) for column in zip(*rounds)]
    plain = medians[0]
    return {
        "tokens": {str(n): round(m, 3) for (n, k), m in zip(kinds, medians) if k is None},
        "cost_of_a_drafted_token": {
            str(n - 1): round((m / plain - 1) / (n - 1), 3) for (n, k), m in zip(kinds, medians) if k is None and n > 1
        },
        "fewer_experts": {str(k): round(m / plain, 3) for (n, k), m in zip(kinds, medians) if k is not None},
    }


# What prompt lookup gains -------------------------------------------------------------------------------------------------


class Scripted:
    """The model, saying what a script wants: every layer runs, then the wanted token gets the largest logit."""

    def __init__(self, model, script: list[int]):
        self.model, self.config, self.device, self.script = model, model.config, model.device, script
        self.blocks = model.blocks

    def features(self, tokens, cache, **options):
        start = cache.length
        self.at = range(start + 1, start + tokens.shape[1] + 1)
        return self.model.features(tokens, cache, **options)

    def unembed(self, hidden):
        logits = self.model.unembed(hidden)
        wanted = self.at if logits.shape[0] == len(self.at) else self.at[-1:]
        for row, place in zip(logits, wanted):
            row[self.script[place % len(self.script)]] = 1e4
        return logits


def _texts() -> dict[str, tuple[str, str]]:
    """Prompt and continuation of both kinds, from the source of the standard library."""
    import shutil
    import textwrap

    source = inspect.getsource(textwrap)[1500:6000]
    return {
        "repeats its prompt": (source, source.replace("self", "this")),
        "does not repeat": (source, inspect.getsource(shutil)[2500:12000]),
    }


def _scripted(model, name: str) -> tuple[Scripted, list[int]]:
    """The model that says text `name`, and its prompt."""
    from xmoe.data.tokenizer import Tokenizer

    # Words of the usual length: with bytes for tokens everything would repeat itself.
    tokenizer = Tokenizer.train(
        [text for pair in _texts().values() for text in pair], min(1200, model.config.vocab_size)
    )
    prompt, continuation = (tokenizer.encode(text) for text in _texts()[name])
    prompt = prompt[: min(512, model.config.max_position_embeddings // 2)]
    return Scripted(model, prompt + continuation), prompt


def _race(name: str, scripted: Scripted, prompt: list[int], source, args) -> dict:
    """Plain decoding and `source` in turn: medians, ratios, and whether they said the same."""
    from xmoe.generation.generate import stream

    def run(source) -> tuple[float, list[int]]:
        settings = {"temperature": 0, "max_new_tokens": args.new_tokens, "stop_tokens": ()}
        *pieces, last = stream(scripted, None, prompt, source=source, **settings)
        return last.timing.decode_tokens_per_second, [piece.token for piece in pieces]

    pairs = [(run(None), run(source)) for _ in range(args.repeat + 1)][1:]
    ratios = [fast[0] / plain[0] for plain, fast in pairs]
    return {
        "text": name,
        "plain_tokens_per_second": round(statistics.median(plain[0] for plain, _ in pairs), 1),
        "tokens_per_second": round(statistics.median(fast[0] for _, fast in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
        "acceptance_rate": source.report.acceptance_rate,
        "tokens_per_pass": source.report.tokens_per_pass,
        "same_text": all(plain[1] == fast[1] for plain, fast in pairs),
    }


def _lookup(model, name: str, args) -> dict:
    from xmoe.generation.drafters import PromptLookup
    from xmoe.generation.speculative import Speculative

    scripted, prompt = _scripted(model, name)
    return _race(name, scripted, prompt, Speculative(PromptLookup(), args.draft_tokens), args)


def _best_cases(model, args) -> list[dict]:
    """The drafters that ask a model, if every guess were right: no real draft can gain more than this."""
    from xmoe.generation.drafters import Checkpoint, SameWeights
    from xmoe.generation.speculative import Speculative
    from xmoe.model.transformer import build

    config = model.config
    layers = max(1, config.num_hidden_layers // 6)
    kinds = config.layer_types[:layers]
    experts = [config.experts_in_layer(i) for i in range(config.num_hidden_layers)]
    # An embedding of its own of the same width: the draft's share of the time is its layers and its unembedding.
    small = build(
        dataclasses.replace(config, num_hidden_layers=layers, layer_types=kinds, num_experts=experts[0]),
        model.device, model.unembedding.dtype, args.seed,
    ).eval()  # fmt: skip
    scripted, prompt = _scripted(model, "does not repeat")
    half = [list(range(max(n // 2, config.num_experts_per_tok))) for n in experts]
    drafters = {
        f"{layers} of {config.num_hidden_layers} layers": Checkpoint(Scripted(small, scripted.script)),
        "half of the experts kept": SameWeights(scripted, kept=half),
    }
    if config.num_experts_per_tok > 1:
        drafters["one expert a token"] = SameWeights(scripted, 1)
    return [_race(name, scripted, prompt, Speculative(d, BEST_CASE_TOKENS), args) for name, d in drafters.items()]


def _table(result: dict) -> str:
    passes = result["passes"]
    lines = [
        f"{result['model']}, {result['layers']} layers, {result['experts']} experts, {result['dtype']} on {result['device']}",
        "",
        "tokens of a pass      " + "".join(f"{n:>9}" for n in passes["tokens"]),
        "milliseconds          " + "".join(f"{m:>9}" for m in passes["tokens"].values()),
        "cost of a drafted one " + " " * 9 + "".join(f"{c:>9}" for c in passes["cost_of_a_drafted_token"].values()),
        *(f"a draft with {k} experts costs {share:.2f} of a pass" for k, share in passes["fewer_experts"].items()),
        "",
    ]
    columns = f"{'plain tok/s':>13}{'tok/s':>9}{'ratio':>8}{'(least, most)':>17}{'accepted':>10}{'a pass':>8}"
    for heading in ("prompt_lookup", "every_guess_right"):
        lines.append(f"{heading.replace('_', ' '):26}{columns}")
        lines += [_row(run) for run in result[heading]]
    return "\n".join(lines)


def _row(run: dict) -> str:
    spread = f"({run['ratio_least']:.2f}, {run['ratio_most']:.2f})"
    rate = "-" if run["acceptance_rate"] is None else f"{run['acceptance_rate']:.0%}"
    return (
        f"{run['text']:26}{run['plain_tokens_per_second']:>13}{run['tokens_per_second']:>9}{run['ratio']:>8.2f}"
        f"{spread:>17}{rate:>10}{run['tokens_per_pass']:>8.2f}"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    command.run(main)
