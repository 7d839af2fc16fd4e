"""Talk to a checkpoint: interactively, or with --prompt for one answer. Text streams as it is made.

GPT-OSS checkpoints converse in Harmony; a base model trained here writes on what it is given.
"""

from __future__ import annotations

import json

from xmoe import command
from xmoe.errors import ConfigError


def arguments(argv: list[str] | None):
    p = command.parser(__doc__, 'python scripts/chat.py --checkpoint checkpoints/quickstart --prompt "def "')
    p.add_argument("--prompt", metavar="TEXT", help="answer this and leave, instead of a conversation")
    p.add_argument("--system", metavar="TEXT", default="", help="instructions that stand before the conversation")
    p.add_argument("--template", choices=("auto", "harmony", "plain", "none"), default="auto",
                   help="how turns are written; none: the text is written on (auto: harmony for GPT-OSS, else none)")  # fmt: skip
    p.add_argument(
        "--reasoning-effort", metavar="low|medium|high", help="how long to think, or how many experts to ask"
    )
    p.add_argument("--num-experts-per-tok", type=int, metavar="K", help="experts each token visits")
    p.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 0.8; 1.0 with Harmony)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: off)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (default: off)")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="least share of the best (default: off)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: less repetition")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: 256; 4096 with Harmony)")
    p.add_argument("--hide-analysis", action="store_true", help="do not show the model's thoughts (Harmony)")
    p.add_argument("--huge-pages", action="store_true", help="CPU: read the weights into huge pages, faster decoding")
    command.add_projections(p)
    p.add_argument("--adapter", metavar="DIR", help="speak with an adapter trained beside this checkpoint")
    p.add_argument("--plan", metavar="PLAN", help="try a pruning plan without cutting")
    draft = p.add_mutually_exclusive_group()
    draft.add_argument("--draft", metavar="DIR", help="speculate with a smaller checkpoint of the same tokenizer")
    draft.add_argument("--draft-plan", metavar="PLAN", help="speculate with the same weights under a pruning plan")
    draft.add_argument("--draft-experts", type=int, metavar="K", help="speculate with fewer experts per token")
    draft.add_argument("--prompt-lookup", action="store_true", help="speculate that the text repeats itself")
    p.add_argument("--draft-tokens", type=int, default=4, metavar="N", help="tokens drafted at a time (default: 4)")
    command.add_common(p)
    args = p.parse_args(argv)
    if args.json and args.prompt is None:
        p.error("--json answers one prompt; give --prompt TEXT")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    # Imported late, so that --help and a wrong flag answer at once.
    from xmoe.generation.terminal import Terminal

    session = open_session(args)
    terminal = Terminal(session, args.checkpoint, hide_analysis=args.hide_analysis)
    if args.json:
        print(json.dumps(terminal.answer_as_json(args.prompt), ensure_ascii=False))
    elif args.prompt is not None:
        terminal.answer_once(args.prompt)
    else:
        terminal.converse()
    return 0


# Setting up ---------------------------------------------------------------------------------------------------------------


def open_session(args):
    """Everything that can be wrong with the flags or the checkpoint is found out here, before a word is said."""
    from xmoe.checkpoint.weights import load
    from xmoe.generation.harmony import speaks_harmony
    from xmoe.generation.session import Continuation, HarmonyChat, PlainChat, set_experts
    from xmoe.generation.settings import read_settings

    settings = {
        "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty, "max_new_tokens": args.max_new_tokens, "seed": args.seed,
    }  # fmt: skip
    read_settings({name: value for name, value in settings.items() if value is not None})
    model, tokenizer = load(
        args.checkpoint, device=args.device, dtype=args.dtype, adapter=args.adapter, huge_pages=args.huge_pages,
        projections=args.projections,
    )  # fmt: skip
    if tokenizer is None:
        raise ConfigError(f"{args.checkpoint} has no tokenizer, so there is nothing to read or write text with")
    template = (
        "harmony" if args.template == "auto" and speaks_harmony(tokenizer, model.source.folder) else args.template
    )
    # OpenAI recommends temperature 1 for GPT-OSS, whose answers are also long, since it thinks aloud.
    defaults = (
        {"temperature": 1.0, "max_new_tokens": 4096}
        if template == "harmony"
        else {"temperature": 0.8, "max_new_tokens": 256}
    )
    settings = {**settings, **{name: value for name, value in defaults.items() if settings[name] is None}}
    settings["overflow"] = "truncate" if template in ("auto", "none") else "error"
    if args.plan:
        from xmoe.compression.apply import mask
        from xmoe.compression.plan import PrunePlan

        mask(model, PrunePlan.load(args.plan))
    source = drafter(args, model, tokenizer)
    if template == "harmony":
        session = HarmonyChat(model, tokenizer, settings, source, args.system)
    elif template == "plain":
        session = PlainChat(model, tokenizer, settings, source, args.system)
    else:
        session = Continuation(model, tokenizer, settings, source)
        if args.system:
            session.set_system(args.system)
    if args.reasoning_effort is not None:
        session.set_effort(args.reasoning_effort)
    if args.num_experts_per_tok is not None:
        set_experts(session, args.num_experts_per_tok)
    return session


def drafter(args, model, tokenizer):
    """What speculates, as the flags ask; None for plain decoding."""
    from xmoe.generation.drafters import Checkpoint, PromptLookup, SameWeights
    from xmoe.generation.speculative import Speculative

    if args.prompt_lookup:
        return Speculative(PromptLookup(), args.draft_tokens)
    if args.draft_experts is not None:
        return Speculative(SameWeights(model, num_experts_per_tok=args.draft_experts), args.draft_tokens)
    if args.draft_plan:
        from xmoe.compression.apply import check
        from xmoe.compression.plan import PrunePlan

        plan = PrunePlan.load(args.draft_plan)
        check(model, plan)
        return Speculative(SameWeights(model, plan.experts_per_token, plan.kept), args.draft_tokens)
    if args.draft:
        from xmoe.checkpoint.weights import load

        small, its_tokenizer = load(args.draft, device=args.device, dtype=args.dtype)
        if its_tokenizer is not None and its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"--draft {args.draft} has another tokenizer than {args.checkpoint}, so its tokens mean something else; "
                "choose a checkpoint with the same one"
            )
        return Speculative(Checkpoint(small), args.draft_tokens)
    return None


if __name__ == "__main__":
    command.run(main)
