"""The benchmarks there are: how a row of each becomes requests to a model, and the table of them all.

Every string here is, to the last byte, the one that the lm-evaluation-harness 0.4.13 sends for the same row; a space on the
wrong side shifts HellaSwag by points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from evaluation import mmlu, wikitext
from evaluation.rows import Location, Row
from evaluation.task import Benchmark, Request
from xmoe.errors import ConfigError

# --- HellaSwag --------------------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """WikiHow's leftovers: ` [title]` becomes a full stop, other brackets go, double spaces are halved once."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(row: Row, shots: str = "") -> dict[str, Any]:
    context = _clean(f"{row.text('activity_label')}: {row.text('ctx_a')} {row.text('ctx_b').capitalize()}")
    endings = [_clean(ending) for ending in row.texts("endings", 4)]
    return _choices(shots + context, endings, row.number_in("label", 4), question=context)


def _choices(context: str, choices: Sequence[str], gold: int, question: str) -> dict[str, Any]:
    return {
        "requests": tuple(Request(context, " " + choice) for choice in choices),
        "gold": gold,
        "question": question,
        "choices": tuple(choices),
        # an empty ending would divide by zero; it has no likelihood to normalise either
        "sizes": tuple(max(1, len(choice)) for choice in choices),
    }


def _with_answer(build: Callable[..., dict[str, Any]]) -> Callable[[Row], str]:
    """A few-shot example of a choice benchmark: its context followed by the right choice."""

    def shot(row: Row) -> str:
        built = build(row, "")
        return "".join(built["requests"][built["gold"]])

    return shot


# --- LAMBADA, OpenAI's variant ----------------------------------------------------------------------------------------


def _lambada(row: Row, shots: str = "") -> dict[str, Any]:
    context, space, word = row.text("text").rpartition(" ")
    if not space or not word:
        raise row.error("the text does not end in a space and a word; expected a passage whose last word is the answer")
    return {"requests": (Request(context, " " + word),), "gold": word}


# --- WinoGrande -------------------------------------------------------------------------------------------------------


def _winogrande(row: Row, shots: str = "") -> dict[str, Any]:
    before, blank, after = row.text("sentence").partition("_")
    if not blank:
        raise row.error("the sentence has no '_' to fill in")
    options = (row.text("option1"), row.text("option2"))
    answer = row.fields.get("answer")
    if str(answer) not in ("1", "2"):
        raise row.error(f"field 'answer' is {answer!r}; expected '1' or '2'")
    return {
        # partial evaluation: the same ending after either name
        "requests": tuple(Request(before + option, " " + after.strip()) for option in options),
        "gold": int(answer) - 1,
        "question": row.text("sentence"),
        "choices": options,
    }


# --- ARC --------------------------------------------------------------------------------------------------------------


def _arc(row: Row, shots: str = "") -> dict[str, Any]:
    choices = row.mapping("choices")
    texts, labels = choices.texts("text"), choices.texts("label", len(choices.texts("text")))
    key = row.text("answerKey")
    if key not in labels:
        raise row.error(f"answerKey is {key!r}; expected one of {', '.join(labels)}")
    question = row.text("question")
    return _choices(f"{shots}Question: {question}\nAnswer:", texts, labels.index(key), question=question)


# --- MMLU -------------------------------------------------------------------------------------------------------------


def _mmlu_subject(row: Row) -> str:
    subject = row.fields.get("subject") or row.part
    if subject not in mmlu.CATEGORY_OF:
        raise row.error(
            f"subject {subject!r} is not one of MMLU's 57; expected it in the file's name or a field 'subject'"
        )
    return subject


def _mmlu(row: Row, shots: str = "") -> dict[str, Any]:
    if "choices" in row.fields:
        choices = row.texts("choices", 4)
    else:
        choices = [row.text(letter) for letter in mmlu.LETTERS]
    letter = row.fields.get("answer")
    gold = mmlu.LETTERS.index(letter) if letter in list(mmlu.LETTERS) else row.number_in("answer", 4)
    context = shots + mmlu.question_text(row.text("question"), choices)
    return {
        "requests": tuple(Request(context, f" {letter}") for letter in mmlu.LETTERS),
        "gold": gold,
        "question": row.text("question").strip(),
        "choices": tuple(choices),
    }


# --- WikiText ---------------------------------------------------------------------------------------------------------


def _wikitext(row: Row, shots: str = "") -> dict[str, Any]:
    page = row.text("page")
    return {
        "requests": (Request("", wikitext.detokenize(page)),),
        "gold": "",
        "sizes": (wikitext.count_words(page), len(page.encode())),
    }


def wikitext_pages(rows: Sequence[Row]) -> list[Row]:
    """Rows that hold lines (field `text`, as the hub has them, or whole files) become rows that hold a `page`."""
    if not rows or "page" in rows[0].fields:
        return list(rows)
    lines: list[str] = []
    for row in rows:
        lines += row.text("text").splitlines(keepends=True) or [" \n"]  # the hub strips blank lines to nothing
    pages = wikitext.articles(lines)
    if not pages:
        raise rows[0].error("no line ' = Title = ' begins an article; expected WikiText, or rows with a field 'page'")
    origin = rows[0].where.split(":")[0]
    return [Row({"page": page}, f"{origin} article {i}") for i, page in enumerate(pages)]


# --- GSM8K ------------------------------------------------------------------------------------------------------------


def _gsm8k(row: Row, shots: str = "") -> dict[str, Any]:
    answer = row.text("answer")
    if "####" not in answer:
        raise row.error("field 'answer' has no '#### number' at its end")
    question = row.text("question")
    return {"requests": (Request(f"{shots}Question: {question}\nAnswer:", ""),), "gold": answer, "question": question}


# --- The table --------------------------------------------------------------------------------------------------------

_ARC_SPLITS = {"eval": ("test", "validation"), "fewshot": ("train", "dev")}
_MMLU_FIELDS = ("question", *mmlu.LETTERS, "answer")

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            name="hellaswag",
            title="HellaSwag",
            kind="choice",
            location=Location(
                ("hellaswag",),
                ("Rowan/hellaswag", None),
                {"eval": ("validation", "test"), "fewshot": ("train",)},
            ),
            chance=0.25,
            build=_hellaswag,
            shot=_with_answer(_hellaswag),
        ),
        Benchmark(
            name="lambada",
            title="LAMBADA (OpenAI)",
            kind="cloze",
            location=Location(
                ("lambada", "lambada_openai"), ("EleutherAI/lambada_openai", "default"), {"eval": ("test",)}
            ),
            chance=0.0,
            build=_lambada,
        ),
        Benchmark(
            name="mmlu",
            title="MMLU",
            kind="choice",
            location=Location(
                ("mmlu",),
                ("cais/mmlu", "all"),
                {"eval": ("test",), "fewshot": ("dev",)},
                part_from_name=True,
                csv_fields=_MMLU_FIELDS,
            ),
            chance=0.25,
            build=_mmlu,
            shot=_with_answer(_mmlu),
            shots_default=5,
            shots_first=True,
            group=_mmlu_subject,
            opening=mmlu.description,
        ),
        Benchmark(
            name="winogrande",
            title="WinoGrande",
            kind="choice",
            location=Location(
                ("winogrande",),
                ("allenai/winogrande", "winogrande_xl"),
                {"eval": ("validation",), "fewshot": ("train",)},
            ),
            chance=0.5,
            build=_winogrande,
        ),
        Benchmark(
            name="arc_easy",
            title="ARC-Easy",
            kind="choice",
            location=Location(
                ("arc_easy", "ARC-Easy", "arc", "ai2_arc"),
                ("allenai/ai2_arc", "ARC-Easy"),
                _ARC_SPLITS,
                must_contain="easy",
            ),
            chance=0.25,
            build=_arc,
            shot=_with_answer(_arc),
        ),
        Benchmark(
            name="arc_challenge",
            title="ARC-Challenge",
            kind="choice",
            location=Location(
                ("arc_challenge", "ARC-Challenge", "arc", "ai2_arc"),
                ("allenai/ai2_arc", "ARC-Challenge"),
                _ARC_SPLITS,
                must_contain="challenge",
            ),
            chance=0.25,
            build=_arc,
            shot=_with_answer(_arc),
        ),
        Benchmark(
            name="wikitext",
            title="WikiText-2",
            kind="rolling",
            location=Location(
                ("wikitext", "wikitext-2", "wikitext-2-raw", "wikitext-2-raw-v1"),
                ("Salesforce/wikitext", "wikitext-2-raw-v1"),
                {"eval": ("test", "validation")},
            ),
            chance=None,
            build=_wikitext,
        ),
        Benchmark(
            name="gsm8k",
            title="GSM8K",
            kind="generate",
            location=Location(("gsm8k",), ("openai/gsm8k", "main"), {"eval": ("test",), "fewshot": ("train",)}),
            chance=0.0,
            build=_gsm8k,
            shot=lambda row: f"{_gsm8k(row)['requests'][0].context} {row.text('answer')}",
            shots_default=5,
            stop=("Question:", "</s>", "<|im_end|>"),
        ),
    )
}
ALIASES = {"lambada_openai": "lambada", "wikitext2": "wikitext", "wikitext-2": "wikitext", "arc-easy": "arc_easy"}


def find(name: str) -> Benchmark:
    """The benchmark of that name; ConfigError with the nearest one where there is none."""
    import difflib

    wanted = ALIASES.get(name.strip().lower(), name.strip().lower())
    if wanted in BENCHMARKS:
        return BENCHMARKS[wanted]
    near = difflib.get_close_matches(wanted, [*BENCHMARKS, *ALIASES], n=1, cutoff=0.5)
    hint = f"did you mean {ALIASES.get(near[0], near[0])}? " if near else ""
    raise ConfigError(
        f"there is no benchmark {name!r}; {hint}choose from {', '.join(BENCHMARKS)}, or all; "
        "--engine lm-eval knows the harness's other tasks"
    )
