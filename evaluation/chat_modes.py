"""Asking models that converse: the letter after a prefilled final channel, or a generated answer that is then read.

GPT-OSS is no base model: the likelihood of raw text after raw text says little about what it knows, and its first two
tokens after a question are `<|channel|>analysis`, never a letter. So there are three modes, and a report names its own:

- raw: log-likelihood of the choices after plain text (scoring.py), right for models trained here and for the harness's numbers;
- letter: the question as a user's message, the reply opened up to `<|channel|>final<|message|>`, and the letters compared;
- generate: the model thinks for itself, and its final channel is read.

MMLU's message is its usual few-shot prompt; other benchmarks are put as lettered questions. GSM8K is generated always,
from plain text in mode raw and from a conversation otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from evaluation.encoding import TokenRequest
from evaluation.scoring import Scorer
from evaluation.settings import EvalConfig
from evaluation.task import Answer, Benchmark, Example, score_choice
from xmoe.checkpoint import config_reading
from xmoe.errors import ConfigError
from xmoe.generation.generate import generate
from xmoe.generation.harmony import Conversation, Harmony, Message

LETTERS = "ABCDEFGHIJ"
INTRODUCTION = {
    "hellaswag": "Which ending continues the text best?",
    "winogrande": "Which of the two fills the blank (_) in the sentence?",
}
ASK_LETTER = "Answer with the letter of the right choice only."
ASK_NUMBER = "Think step by step, and end your answer with a line '#### ' and the number alone."
NEW_TOKENS = 1024  # room to think; an answer that is cut off counts as wrong and not answered

# Tried in this order: a reply that is a letter, one that says which letter it means, and the last letter set apart.
_ONLY_LETTER = re.compile(r"^\W*([A-J])\W*$")
_NAMED_LETTER = re.compile(r"(?:answer|choice|option)\s*(?:is|:)?\s*[*(\[{]*\s*([A-J])\b(?!')", re.IGNORECASE)
_LEADING_LETTER = re.compile(r"^\W*([A-J])(?:[.):*\]]|\n)")
_SET_APART = re.compile(r"[(*\[{]([A-J])[)*\]}]")


def user_message(benchmark: Benchmark, example: Example) -> str:
    """What the user says in modes letter and generate."""
    if benchmark.name in ("mmlu", "gsm8k"):
        return example.requests[0].context
    lettered = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, example.choices))
    introduction = INTRODUCTION.get(benchmark.name)
    return (f"{introduction}\n\n" if introduction else "") + f"{example.question}\n{lettered}Answer:"


def conversation(benchmark: Benchmark, example: Example, effort: str | None) -> Conversation:
    """The question as a conversation; no date in it, so that it is the same tomorrow."""
    ask = ASK_NUMBER if benchmark.kind == "generate" else ASK_LETTER
    return Conversation(
        [Message("user", user_message(benchmark, example))], instructions=ask, effort=effort or "medium"
    )


def letter_answers(
    benchmark: Benchmark, examples: Sequence[Example], scorer: Scorer, config: EvalConfig
) -> Iterator[tuple[int, list[Answer]]]:
    """The log-likelihood of each choice's letter as the first word of the final channel; GSM8K has none."""
    harmony = Harmony(scorer.tokenizer)
    encode = scorer.tokenizer.encode
    requests, owners = [], []
    for number, example in enumerate(examples):
        ids = harmony.render(conversation(benchmark, example, config.reasoning_effort))
        ids += [harmony.channel, *encode("final"), harmony.message]
        cut = max(0, len(ids) - scorer.max_length)
        scorer.requests_cut += cut > 0
        for letter in LETTERS[: len(example.choices)]:
            requests.append(TokenRequest(ids[cut:], encode(letter), cut))
            owners.append(number)
    first = {number: i for i, number in reversed(list(enumerate(owners)))}
    waiting: dict[int, dict[int, Answer]] = {}
    for i, answer in scorer.score_tokens(requests):
        number = owners[i]
        got = waiting.setdefault(number, {})
        got[i - first[number]] = answer
        if len(got) == len(examples[number].choices):
            yield number, [got[k] for k in range(len(got))]


def generated_answers(
    benchmark: Benchmark, examples: Sequence[Example], scorer: Scorer, config: EvalConfig
) -> Iterator[tuple[int, list[Answer]]]:
    """One answer an example: what follows the plain prompt (mode raw), or the final channel of the model's reply."""
    chat = config.mode != "raw"
    harmony = Harmony(scorer.tokenizer) if chat else None
    new_tokens = config.max_new_tokens or (NEW_TOKENS if chat else benchmark.max_new_tokens)
    if new_tokens >= scorer.max_length:
        raise ConfigError(
            f"max_new_tokens {new_tokens} leaves no room for the question; max_length is {scorer.max_length}"
        )
    prompts = []
    for example in examples:
        if chat:
            ids = harmony.render(conversation(benchmark, example, config.reasoning_effort))
        else:
            ids = scorer.tokenizer.encode(example.requests[0].context)
        room = scorer.max_length - new_tokens
        scorer.requests_cut += len(ids) > room
        prompts.append(ids[-room:])
    # Batches of like length need little padding. The longest go first, as in scoring.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), scorer.batch_size):
        batch = order[start : start + scorer.batch_size]
        completions = generate(
            scorer.model,
            scorer.tokenizer,
            [prompts[i] for i in batch],
            batch_size=scorer.batch_size,
            max_new_tokens=new_tokens,
            temperature=config.temperature,
            seed=config.seed + batch[0],
            num_experts_per_tok=scorer.num_experts_per_tok,
            stop=() if chat else benchmark.stop,
            stop_tokens=harmony.stop_tokens if chat else end_tokens(scorer),
        )
        for i, completion in zip(batch, completions):
            scorer.tokens_computed += len(prompts[i]) + len(completion.ids)
            text = (
                final_text(harmony, completion.ids)
                if chat
                else plain_text(scorer.tokenizer, completion.ids, benchmark.stop)
            )
            yield i, [Answer(text=text)]


def end_tokens(scorer: Scorer) -> frozenset[int]:
    """Where plain generation ends: the tokenizer's end of text, and what the checkpoint says of itself."""
    source = getattr(scorer.model, "source", None)
    stated = frozenset() if source is None else config_reading.end_tokens(source.folder, source.extra)
    return stated | ({scorer.tokenizer.eos_id} - {None})


def plain_text(tokenizer, ids: Sequence[int], stop: Sequence[str]) -> str:
    """What `ids` say up to the first stop string, as the harness reads it.

    Special tokens are left out; half a character at the end shows as U+FFFD, which a stream of text would hold back.
    """
    text = tokenizer.decode(ids, skip_special=True)
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def final_text(harmony: Harmony, ids: Sequence[int]) -> str:
    """The last message of the final channel; a reply that never reached it (cut off while thinking) gives nothing.

    A model that answers without any channel has said its answer plainly.
    """
    messages = harmony.parse(ids, strict=False)
    final = [m.text for m in messages if m.role == "assistant" and m.channel in ("final", None)]
    return final[-1].strip() if final else ""


def parse_letter(text: str, choices: int) -> int | None:
    """The number of the choice that a reply names, or None where it names none of them."""
    found = None
    for pattern in (_ONLY_LETTER, _NAMED_LETTER, _LEADING_LETTER, _SET_APART):
        letters = [m.upper() for m in pattern.findall(text.strip())]
        letters = [m for m in letters if LETTERS.index(m) < choices]
        if letters:
            found = LETTERS.index(letters[-1])
            break
    return found


def score_chat(example: Example, answers: Sequence[Answer], mode: str) -> dict[str, float]:
    """Per-row values of a choice benchmark in modes letter and generate. An answer that cannot be read is wrong."""
    if mode == "letter":
        values = score_choice(example, [a.loglikelihood for a in answers])
        return {"acc": values["acc"], "prediction": values["prediction"]}
    choice = parse_letter(answers[0].text, len(example.choices))
    return {
        "acc": float(choice == example.gold),
        "prediction": -1.0 if choice is None else float(choice),
        "answered": float(choice is not None),
    }
