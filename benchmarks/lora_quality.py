"""What an adapter learns and what a merge keeps of it: validation loss of the base, the adapter, and both merged checkpoints.

    python benchmarks/lora_quality.py --checkpoint checkpoints/quickstart

The checkpoint's experts are packed in MXFP4 first. An adapter is trained beside them as configs/train/lora_quickstart.yaml
says (`--set` changes it), then merged into dense and into MXFP4 experts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from xmoe import command
from xmoe.outputs import new_file

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "lora_quickstart.yaml"


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python benchmarks/lora_quality.py --checkpoint checkpoints/quickstart")
    p.add_argument("--checkpoint", required=True, metavar="DIR", help="a small model, such as that of make quickstart")
    p.add_argument("--config", default=str(CONFIG), metavar="FILE", help="default: configs/train/lora_quickstart.yaml")
    command.add_set(p)
    p.add_argument("--output", metavar="FILE.json", help="where the readings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="xmoe-lora-") as folder:
        result = measure(args, Path(folder))
    print(table(result))
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(args, folder: Path) -> dict:
    """Pack, train, merge; the losses of each."""
    from xmoe.checkpoint.adapters import MERGED
    from xmoe.checkpoint.weights import convert, load
    from xmoe.config import load_config
    from xmoe.model.perplexity import mean_loss
    from xmoe.training.config import RunConfig
    from xmoe.training.trainer import Trainer

    base = convert(args.checkpoint, folder / "base", "hf-mxfp4")
    # The shape is that of the packed checkpoint, whatever the config says: Hugging Face's layouts tie no embeddings.
    config = load_config(RunConfig, args.config, [*args.set, f"train.init_from={base}"])
    config = dataclasses.replace(config, model=None)
    trainer = Trainer(config, folder / "run", console=sys.stderr)
    losses = {"base, experts in MXFP4": mean_loss(trainer.model, trainer.validation)}
    run = trainer.run()
    losses["adapter beside it"] = run.loss
    merge = {}
    for layout, name in (("hf-bf16", "merged, dense bf16"), ("hf-mxfp4", "merged, MXFP4")):
        merged = convert(base, folder / layout, layout, adapter=run.checkpoint)
        losses[name] = mean_loss(load(merged, device=trainer.device)[0], trainer.validation)
        merge = json.loads((merged / MERGED).read_text(encoding="utf-8"))
    trained = sum(p.numel() for p in trainer.optimizer.parameters)
    settings = {"steps": run.steps, "tokens": run.tokens, "rank": config.lora.rank, "alpha": config.lora.alpha}
    kept = {key: merge[key] for key in ("mxfp4_relative_error", "mxfp4_change_kept")}
    return {"losses": losses, "trained_parameters": trained, **settings, **kept}


def table(result: dict) -> str:
    """Readings as text."""
    lines = [f"{name:<28}{loss:8.4f} nats" for name, loss in result["losses"].items()]
    lines.append(
        f"{result['trained_parameters']:,} parameters trained for {result['steps']} steps; rounding to MXFP4: error "
        f"{result['mxfp4_relative_error']:.2%}, {result['mxfp4_change_kept']:.1%} of the change kept"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
