"""The scorer against one plain forward pass a request: values, greedy decisions, batch sizes, routing of real tokens."""

from __future__ import annotations

import random

import pytest
import torch

from evaluation.encoding import encode_requests, windows
from evaluation.scoring import Scorer
from evaluation.task import Request
from xmoe.errors import ConfigError

BLOCKS = [
    "The following are questions about trees and their leaves.\n\n",
    "Another subject altogether, with its own block. ",
]


def requests(seed: int = 0) -> list[Request]:
    """Few-shot blocks, contexts with four endings, single letters, a whole text, and one of each that shares nothing."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join("".join(draw.choices("abcde", k=draw.randint(1, 7))) for _ in range(draw.randint(low, high)))

    found = []
    for question in range(9):
        context = draw.choice(["", *BLOCKS]) + words(2, 12)
        ends = "ABCD" if question % 2 else [words(1, 4) for _ in range(4)]
        found += [Request(context, " " + end) for end in ends]
    return [*found, Request("", "no context at all"), Request("trailing  ", "x"), Request(words(30, 40), " long")]


@torch.inference_mode()
def one_by_one(model, scorer: Scorer, asked: list[Request]) -> list[tuple[float, bool]]:
    answers = []
    for request in encode_requests(asked, scorer.tokenizer, scorer.prefix, scorer.max_length):
        ids = request.context + request.targets[:-1]
        logits = model(torch.tensor([ids])).logits[0, -len(request.targets) :].double().log_softmax(-1)
        targets = torch.tensor(request.targets)
        answers.append((logits.gather(1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())))
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_equals_one_forward_pass_a_request(model, tokenizer, batch_size):
    asked = requests()
    scorer = Scorer(model, tokenizer, batch_size=batch_size)
    answers = scorer.loglikelihoods(asked)
    expected = one_by_one(model, scorer, asked)
    assert [a.loglikelihood for a in answers] == pytest.approx([ll for ll, _ in expected], abs=1e-4)
    assert [a.is_greedy for a in answers] == [greedy for _, greedy in expected]
    plain = sum(len(tokenizer.encode(r.context + r.continuation)) for r in asked)
    assert scorer.tokens_computed < 0.55 * plain  # prefixes were shared


def test_greedy_is_true_where_the_model_would_say_just_that(model, tokenizer):
    """A random model seldom guesses a text, so let it say one: the bytes it would decode from a context."""
    scorer = Scorer(model, tokenizer)
    ids = tokenizer.encode("abc")
    with torch.inference_mode():
        for _ in range(4):
            logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
    from evaluation.encoding import TokenRequest

    wrong = [*ids[3:6], (ids[6] + 1) % 256]
    found = dict(scorer.score_tokens([TokenRequest(ids[:3], ids[3:]), TokenRequest(ids[:3], wrong)]))
    assert found[0].is_greedy and not found[1].is_greedy


def test_a_cut_request_is_scored_as_its_right_end_and_counted(model, tokenizer):
    scorer = Scorer(model, tokenizer, max_length=16)
    long = Request("x" * 10 + "what stays is this", " end")
    (answer,) = scorer.loglikelihoods([long])
    assert scorer.requests_cut == 1
    assert answer.loglikelihood == pytest.approx(one_by_one(model, scorer, [long])[0][0], abs=1e-4)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_rolling_sums_its_windows(model, tokenizer, length):
    scorer = Scorer(model, tokenizer, max_length=16, batch_size=3)
    texts = ["".join(random.Random(i).choices("abc .", k=length + 5 * i)) for i in range(3)] + [""]
    found = scorer.rolling(texts)
    assert found[3].loglikelihood == 0.0
    for text, answer in zip(texts[:3], found):
        total = 0.0
        for window in windows(tokenizer.encode(text), scorer.prefix, 16):
            ids = torch.tensor([window.context + window.targets])
            with torch.inference_mode():
                logits = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
            total += logits[-len(window.targets) :].gather(1, ids[0, -len(window.targets) :, None]).sum().item()
        assert answer.loglikelihood == pytest.approx(total, abs=1e-4)


def test_unembedding_in_pieces_changes_nothing(model, tokenizer, monkeypatch):
    asked = requests(1)
    whole = Scorer(model, tokenizer).loglikelihoods(asked)
    monkeypatch.setattr("evaluation.scoring.LOGITS_AT_ONCE", model.config.vocab_size * 2)
    pieces = Scorer(model, tokenizer).loglikelihoods(asked)
    assert [a.loglikelihood for a in pieces] == pytest.approx([a.loglikelihood for a in whole], abs=1e-5)
    assert [a.is_greedy for a in pieces] == [a.is_greedy for a in whole]


def test_padding_never_reaches_the_routing(model, tokenizer):
    """Counts of a padded batch equal those of unpadded passes, and norms are there when asked for."""
    asked = [Request("abcdefgh", " i"), Request("xy", " z"), Request("0123456789 12345", " 6")]

    def record(batch_size: int) -> torch.Tensor:
        counts = torch.zeros(4, 5, dtype=torch.int64)

        def observe(layer, routing):
            assert routing.output_norm is not None and routing.output_norm.shape == routing.indices.shape
            counts[layer] += torch.bincount(routing.indices.flatten(), minlength=5)

        scorer = Scorer(model, tokenizer, batch_size=batch_size, observe=observe, norms=True)
        scorer.loglikelihoods(asked)
        assert int(counts.sum()) == scorer.tokens_computed * 4 * 3
        return counts

    together, apart = record(3), record(1)
    assert torch.equal(together, apart)
    assert int(together[0].sum()) == 3 * sum(len(r.context + r.continuation) - 1 for r in asked)


def test_fewer_experts_per_token_is_another_model(model, tokenizer):
    asked = requests(2)[:8]
    one = Scorer(model, tokenizer, num_experts_per_tok=1).loglikelihoods(asked)
    three = Scorer(model, tokenizer).loglikelihoods(asked)
    assert any(abs(a.loglikelihood - b.loglikelihood) > 1e-2 for a, b in zip(one, three))


def test_impossible_settings(model, tokenizer):
    with pytest.raises(ConfigError, match="--batch-size 0"):
        Scorer(model, tokenizer, batch_size=0)
    with pytest.raises(ConfigError, match="--max-length 4096: expected 2 to 2048"):
        Scorer(model, tokenizer, max_length=4096)
