"""Rows -> request strings and metrics, against values worked out by hand."""

from __future__ import annotations

import pytest

from evaluation.gsm8k import normalise_number, score_number
from evaluation.rows import Row, load_rows
from evaluation.task import Answer, Example
from evaluation.tasks import BENCHMARKS, find, wikitext_pages
from xmoe.errors import ConfigError, DataError


def examples_of(name: str, data_dir, shots: int = 0) -> list[Example]:
    benchmark = BENCHMARKS[name]
    rows, _ = load_rows(name, benchmark.location, "eval", data_dir)
    few = None
    if shots:
        few = benchmark.few_shot(load_rows(name, benchmark.location, "fewshot", data_dir)[0], shots)
    return benchmark.examples(wikitext_pages(rows) if benchmark.kind == "rolling" else rows, few)


def test_hellaswag_cleans_wikihow_and_puts_the_space_before_the_ending(data_dir):
    first, second = examples_of("hellaswag", data_dir)
    assert first.requests[0] == ("Baking bread: A man kneads dough on a table. The man", " sings.")
    assert [r.continuation for r in first.requests[1:]] == [
        " puts it into an oven.",
        " flies off at once.",
        " is a loaf.",
    ]
    assert first.gold == 1 and first.sizes == (6, 21, 18, 10)
    # ' [title]' becomes a full stop and a space, '[step]' goes, and the double spaces they leave are halved
    assert second.requests[0].context == "Home and Garden: How to mow. Wait for dry grass. Wet grass clogs."
    assert second.requests[1].continuation == " Mow at night. Sleep." and second.gold == 3


def test_lambada_splits_at_the_last_space_only(data_dir):
    first, second = examples_of("lambada", data_dir)
    assert first.requests == (
        ("She looked for the key under the mat, found it, and with a sigh she turned the", " key"),
    )
    assert second.requests[0].continuation == " clock" and second.requests[0].context.endswith("mend the\nold ")


def test_winogrande_puts_the_same_ending_after_either_option(data_dir):
    first, second = examples_of("winogrande", data_dir)
    assert first.requests == (
        ("Ann lent Eve her car because Ann", " was kind ."),
        ("Ann lent Eve her car because Eve", " was kind ."),
    )
    assert (first.gold, second.gold) == (0, 1)


def test_arc_takes_any_number_of_choices_and_numbers_as_keys(data_dir):
    first, second = examples_of("arc_easy", data_dir)
    assert first.requests[2] == ("Question: Which of these is a mammal?\nAnswer:", " gecko")
    assert (first.gold, second.gold, len(second.requests)) == (1, 0, 5)
    assert len(examples_of("arc_challenge", data_dir)) == 1


def test_each_row_gets_examples_of_its_own_from_one_generator(data_dir):
    questions = {
        "mammal": "Question: Which of these is a mammal?\nAnswer: whale\n\n",
        "ice": "Question: What melts ice?\nAnswer: heat\n\n",
    }
    # random.Random(1234): sample([0, 1], 1) gives 1, then 0; sample([0, 1], 2) gives [1, 0], then [0, 1]
    for shots, drawn in ((1, (["ice"], ["mammal"])), (2, (["ice", "mammal"], ["mammal", "ice"]))):
        examples = examples_of("arc_easy", data_dir, shots=shots)
        assert [e.requests[0].context for e in examples] == [
            "".join(questions[name] for name in names) + own
            for names, own in zip(
                drawn,
                ("Question: Which of these is a mammal?\nAnswer:", "Question: What melts ice?\nAnswer:"),
            )
        ]


def test_mmlu_prompt_with_and_without_examples(data_dir):
    plain = {e.name: e for e in examples_of("mmlu", data_dir)}
    assert len(plain) == 10
    choices = "A. one 1\nB. two, or so\nC. three\nD. four us_foreign_policy"
    question = f'Which, for us_foreign_policy 1,\nis "best"?\n{choices}\nAnswer:'
    opening = "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    example = plain["us_foreign_policy/1"]
    assert example.requests == tuple((opening + question, f" {letter}") for letter in "ABCD")
    assert example.gold == (1 + len("us_foreign_policy")) % 4
    shot = {e.name: e for e in examples_of("mmlu", data_dir, shots=1)}["us_foreign_policy/1"]
    before = question.replace("policy 1,", "policy 100,").replace("one 1\n", "one 100\n")
    letter = "ABCD"[(100 + len("us_foreign_policy")) % 4]
    assert shot.requests[0].context == f"{opening}{before} {letter}\n\n{question}"


def test_mmlu_takes_the_hub_layout_too():
    fields = {"question": "Q?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}
    (example,) = BENCHMARKS["mmlu"].examples([Row(fields, "hub row 0")])
    assert example.group == "anatomy" and example.gold == 2
    assert example.requests[3].context.endswith("Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:")


def test_gsm8k_prompt_and_exact_match(data_dir):
    (example,) = examples_of("gsm8k", data_dir, shots=2)
    shots = (
        "Question: Three and two?\nAnswer: 3 + 2 = <<3+2=5>>5\n#### 5\n\n"
        "Question: Nought and two?\nAnswer: 0 + 2 = <<0+2=2>>2\n#### 2\n\n"
    )
    assert example.requests[0].context == shots + "Question: Two and two?\nAnswer:"
    score = BENCHMARKS["gsm8k"].score
    assert score(example, [Answer(text=" It is 2+2.\n#### 4")]) == {
        "exact_match": 1,
        "flexible_match": 1,
        "answered": 1,
    }
    assert score(example, [Answer(text=" So $4.00, no, 4.")]) == {"exact_match": 0, "flexible_match": 1, "answered": 1}
    assert score(example, [Answer(text="who knows")]) == {"exact_match": 0, "flexible_match": 0, "answered": 0}
    assert score_number("so\n#### 1,234", "#### 1234.")["exact_match"] == 1
    assert normalise_number("much\n#### $1,000.") == "1000"


def test_wikitext_counts_words_of_the_untouched_page(data_dir):
    example = examples_of("wikitext", data_dir)[1]
    page = " = Moss = \n \n Moss is green @-@ ish , and 3 @.@ 5 cm tall . Why ? \n "
    assert example.requests == (("", " = Moss =\n\nMoss is green-ish, and 3.5 cm tall. Why?\n"),)
    assert example.sizes == (20, len(page))
    values = BENCHMARKS["wikitext"].score(example, [Answer(-5.0)])
    assert values == {"loglikelihood": -5.0, "words": 20.0, "bytes": float(len(page))}


def test_wikitext_lines_become_articles():
    rows = [
        Row({"text": t}, "f") for t in ("", " = A = \n", "", " text \n", " = = sub = = \n", "", " = B = \n", " b \n")
    ]
    pages = [r.text("page") for r in wikitext_pages(rows)]
    assert pages == [" = A = \n \n text \n = = sub = = \n ", " = B = \n b "]
    whole = [Row({"text": " \n = A = \n \n text \n = = sub = = \n \n = B = \n b \n"}, "wiki.test.raw")]
    assert [r.text("page") for r in wikitext_pages(whole)] == pages
    with pytest.raises(DataError, match="Title"):
        wikitext_pages([Row({"text": "no heading\n"}, "f")])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["x"], "label": 0}, "4 strings"),
        ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["x"] * 4, "label": 4}, "0 to 3"),
        ("lambada", {"text": "word"}, "last word"),
        ("lambada", {"txt": "a b"}, "no field 'text'; the row has txt"),
        ("winogrande", {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "no '_'"),
        ("winogrande", {"sentence": "a _", "option1": "a", "option2": "b", "answer": ""}, "expected '1' or '2'"),
        (
            "arc_easy",
            {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "answerKey is 'B'",
        ),
        ("mmlu", {"subject": "alchemy", "question": "q"}, "not one of MMLU's 57"),
        ("mmlu", {"subject": "anatomy", "question": "q", "choices": list("abcd"), "answer": "E"}, "0 to 3"),
        ("gsm8k", {"question": "q", "answer": "4"}, "####"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(name, fields, message):
    with pytest.raises(DataError, match=r"^rows.jsonl:7: ") as caught:
        BENCHMARKS[name].examples([Row(fields, "rows.jsonl:7")])
    assert message in str(caught.value)


def test_an_unknown_benchmark_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean hellaswag"):
        find("helaswag")
    assert find("lambada_openai") is find("LAMBADA")


def test_too_few_examples_in_the_prompt(data_dir):
    with pytest.raises(DataError, match="only 2 few-shot rows"):
        examples_of("arc_easy", data_dir, shots=3)
