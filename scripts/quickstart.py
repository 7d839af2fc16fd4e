"""The whole story on a CPU in a few minutes: train a small MoE, watch its routers, prune half of its experts, compare, talk.

`make quickstart` runs this. It needs no network and no data: the text is the source of Python's own standard library.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from xmoe import command

PROMPTS = ("def read_", "import os\n\nclass ", "    for line in ")
CRITERIA = ("frequency", "reap")
RECORDED_TOKENS = 65_536
RECOVERY_STEPS = 60


def main(argv: list[str] | None = None) -> None:
    p = command.parser(__doc__.splitlines()[0], "python scripts/quickstart.py --output checkpoints/quickstart")
    p.add_argument("--config", default="configs/train/quickstart.yaml", help="what to train")
    p.add_argument("--output", default="checkpoints/quickstart", help="the run folder; an older one is replaced")
    command.add_set(p)
    arguments = p.parse_args(argv)
    began = time.perf_counter()

    from xmoe.checkpoint.weights import load, save
    from xmoe.compression.apply import mask, prune
    from xmoe.compression.plan import plan_pruning
    from xmoe.compression.recover import recover
    from xmoe.compression.routing import record_routing
    from xmoe.config import load_config
    from xmoe.data.stream import load_data
    from xmoe.device import pick_device, pick_dtype
    from xmoe.generation.generate import generate
    from xmoe.model.describe import describe
    from xmoe.model.perplexity import mean_loss, perplexity
    from xmoe.outputs import new_file
    from xmoe.training.config import RunConfig
    from xmoe.training.trainer import train

    output = Path(arguments.output)
    config = load_config(RunConfig, arguments.config, arguments.set)

    heading("1. Train a small Mixture of Experts on the source text of Python's standard library")
    run = train(config, output=output, overwrite=True)

    model, tokenizer = load(output, dtype="float32")
    dtype = pick_dtype("auto", pick_device("cpu"))
    data = load_data(config.data, tokenizer)
    held_out = list(data.validation_batches(8))

    def loss_of(network) -> float:
        return mean_loss(network, held_out, dtype=dtype)

    heading("2. Watch which experts the routers choose")
    calibration = some_batches(data.train_batches(8, seed=1), RECORDED_TOKENS)
    stats = record_routing(model, calibration, domain="python source")
    with new_file(output / "routing.safetensors", overwrite=True) as partial:
        stats.save(partial, overwrite=True)
    print(loads(stats, model))

    heading("3. Prune half of the experts: two criteria, tried by masking before anything is cut")
    keep = config.model.experts_in_layer(0) // 2
    full = run.loss
    rows = [("all experts", config.model.num_experts, full)]
    tried = {}
    for criterion in CRITERIA:
        plan = plan_pruning(stats, criterion=criterion, keep=keep)
        with mask(model, plan):
            tried[criterion] = (loss_of(model), plan)
        rows.append((f"kept by {criterion}", keep, tried[criterion][0]))
    better = min(CRITERIA, key=lambda name: tried[name][0])
    plan = tried[better][1]
    small = prune(model, plan)
    cut = loss_of(small)

    heading(f"4. Win some of it back: teach the routers of the {better} cut to agree with the uncut model")
    recover(small, model, calibration, train="routers", steps=RECOVERY_STEPS)
    recovered = loss_of(small)
    rows.append((f"{better}, routers recovered", keep, recovered))
    save(small, output / "pruned", tokenizer=tokenizer)

    print(f"\n{'':28}{'experts':>8}{'loss':>9}{'perplexity':>12}")
    for name, experts, loss in rows:
        print(f"{name:28}{experts!s:>8}{loss:>9.4f}{perplexity(loss):>12.2f}")
    print(f"\nbefore: {describe(model)}\nafter:  {describe(small)}")
    print(f"the cut cost {cut - full:.4f} nats a token; the routers won back {cut - recovered:.4f} of them")

    heading("5. Let both complete three prompts")
    for name, network in (("all experts", model), (f"{keep} experts", small)):
        for completion, prompt in zip(generate(network, tokenizer, PROMPTS, max_new_tokens=40, temperature=0), PROMPTS):
            print(f"[{name}]\n{prompt}{completion.text}\n")

    print(f"done in {time.perf_counter() - began:.0f} s. Next:")
    print(f"  {sys.executable} scripts/chat.py --checkpoint {output}")
    print(f"  {sys.executable} scripts/chat.py --checkpoint {output / 'pruned'} --prompt 'class Queue'")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def some_batches(batches: Iterable, tokens: int) -> list:
    """Token ids [B, S] of as many training batches as hold `tokens` tokens."""
    taken, count = [], 0
    for batch in batches:
        taken.append(batch.inputs)
        count += batch.inputs.numel()
        if count >= tokens:
            return taken
    return taken


def loads(stats, model) -> str:
    """A line a layer: the share of tokens each expert gets, in units of an even share, and the layer's balance."""
    from xmoe.model.router import router_health

    lines = []
    for layer in range(stats.num_layers):
        counts = stats.layer(layer).count
        health = router_health(counts)
        shares = " ".join(f"{float(c) * len(counts) / float(counts.sum()):.2f}" for c in counts)
        lines.append(f"layer {layer}: load {shares}   MaxVio {health.max_violation:.2f}, dead {health.dead}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
