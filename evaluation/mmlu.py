"""MMLU: 57 subjects in four categories, and the averages people quote (Hendrycks et al., arXiv 2009.03300).

Micro counts every question once (the original paper and lm-eval's group value); macro counts every subject once. They
differ by up to two points, so a number without its name is no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CATEGORIES: dict[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
CATEGORY_OF = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects}
SUBJECTS = tuple(sorted(CATEGORY_OF))
LETTERS = "ABCD"


def description(subject: str) -> str:
    """The sentence that opens every prompt of a subject."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def question_text(question: str, choices: Sequence[str]) -> str:
    """The question, its lettered choices and `Answer:`; also the form of a few-shot example before its letter."""
    lettered = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
    return f"{question.strip()}\n{lettered}Answer:"


def groupings(subjects: Iterable[str]) -> dict[str, list[str]]:
    """Metric name -> the subjects it averages over: `category/stem` ..., then `subject/anatomy` ..., those present."""
    present = sorted(set(subjects))
    named = {f"category/{c}": [s for s in present if CATEGORY_OF.get(s) == c] for c in CATEGORIES}
    named |= {f"subject/{s}": [s] for s in present}
    return {name: members for name, members in named.items() if members}
