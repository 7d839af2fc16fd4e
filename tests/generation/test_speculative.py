"""Draft and verify changes nothing but speed: greedy text token for token, sampled text in distribution."""

from __future__ import annotations

import itertools

import pytest
import torch

from xmoe.errors import ConfigError
from xmoe.generation.cache import KVCache
from xmoe.generation.drafters import Checkpoint, PromptLookup, SameWeights
from xmoe.generation.generate import PromptMemory, stream
from xmoe.generation.sampling import Sampler, SamplingConfig, distribution
from xmoe.generation.speculative import Draft, Report, Speculative, verify
from xmoe.model.config import preset

CONFIG = preset("tiny", num_hidden_layers=2, max_position_embeddings=200)
KEPT = [[0, 2, 3, 5, 7], [1, 4, 5, 6, 8, 9]]

DRAFTERS = {
    "prompt lookup": lambda model, other: PromptLookup(shortest=1),
    "another checkpoint": lambda model, other: Checkpoint(other),
    "itself": lambda model, other: Checkpoint(model),
    "fewer experts": lambda model, other: SameWeights(model, num_experts_per_tok=1),
    "pruning plan": lambda model, other: SameWeights(model, kept=KEPT),
}


def ids_of(pieces):
    return [p.token for p in pieces][:-1]


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_text_is_the_same_token_for_token(random_model, name, penalty):
    """Through several windows (8) and with a loop in the prompt; the drafter is used for text after text."""
    model, other = random_model(CONFIG), random_model(CONFIG)
    with torch.no_grad():  # a model that often agrees, and not always
        other.embed.weight += 0.3 * torch.randn(other.embed.weight.shape)
    source = Speculative(DRAFTERS[name](model, other), draft_tokens=3)
    accepted = 0
    for n in range(8):
        prompt = torch.randint(0, 320, (3 + n,)).tolist() * 3
        settings = {"temperature": 0, "repetition_penalty": penalty, "max_new_tokens": 25, "prefill_chunk": 10}
        plain = ids_of(stream(model, None, prompt, **settings))
        assert ids_of(stream(model, None, prompt, source=source, **settings)) == plain
        accepted += source.report.accepted
        assert source.report.proposed > 0
    if name == "itself" and penalty == 1.0:
        assert source.report.acceptance_rate == 1.0
        assert source.report.tokens_per_pass == 4.0
    assert accepted > 0, "nothing was accepted, so nothing was tested"


def test_it_works_from_a_remembered_prompt(random_model):
    model = random_model(CONFIG)
    source, memory = Speculative(SameWeights(model, num_experts_per_tok=1), 3), PromptMemory()
    settings = {"temperature": 0, "max_new_tokens": 20}
    prompt = list(range(30))
    for _ in range(3):
        *pieces, last = stream(model, None, prompt, source=source, memory=memory, **settings)
        assert ids_of([*pieces, last]) == ids_of(stream(model, None, prompt, **settings))
        prompt = [*prompt, 7, 8, 9]
    assert last.timing.remembered_tokens == 33


def test_the_model_is_itself_again_after_a_draft_under_a_plan(random_model):
    model = random_model(CONFIG)
    tokens = torch.randint(0, 320, (1, 12))
    with torch.inference_mode():
        before = model(tokens).logits
        drafter = SameWeights(model, kept=KEPT)
        drafter.begin(model)
        cache = KVCache(CONFIG, rollback=3)
        model.features(tokens[:, :-1], cache)
        draft = drafter.propose(tokens[0].tolist(), 3, cache, SamplingConfig(temperature=0), [])
        assert cache.length == 11
        torch.testing.assert_close(model(tokens).logits, before, atol=0, rtol=0)
        for block, ids in zip(model.blocks, KEPT):
            block.moe.router.keep_only(ids)
        # The draft looked back at what the whole model saw.
        assert int(model(tokens[:, -1:], cache).logits[0, -1].argmax()) == draft.ids[0]


class Chain:
    """A model whose next token depends on the last one only: `table` [V, V] are its logits. Quick, and known in full."""

    def __init__(self, table):
        self.table, self.device = table, torch.device("cpu")
        self.config = preset("tiny", vocab_size=table.shape[0], max_position_embeddings=100_000)

    def features(self, tokens, cache, *, positions=None, num_experts_per_tok=None):
        cache.advance(tokens.shape[1])
        return type("Features", (), {"hidden": tokens.unsqueeze(-1)})

    def unembed(self, hidden):
        return self.table[hidden[..., 0]]


CHAIN = torch.tensor([[0.5, 1.0, -1.0, 0.0], [1.5, -0.5, 0.3, 0.0], [0.0, 0.2, 0.1, 0.9], [-0.3, 0.8, 0.4, 0.1]])


@pytest.mark.parametrize("drafter", ["lookup", "model"])
def test_sampled_text_has_the_distribution_of_the_model(drafter):
    """Chi-square over the transitions of one long text; 12 degrees of freedom exceed 32.9 once in a thousand seeds."""
    model = Chain(CHAIN)
    guess = (
        PromptLookup(longest=2, shortest=1, first=0, each=0.01)
        if drafter == "lookup"
        else Checkpoint(Chain(CHAIN.flip(0) * 1.5))
    )
    config = SamplingConfig(temperature=0.9, seed=4)
    source = Speculative(guess, 3)
    tokens = source.tokens(
        model, KVCache(model.config, rollback=3), [0], Sampler(config, 1), num_experts_per_tok=None, chunk=8
    )
    text = [0] + [next(tokens) for _ in range(8000)]
    counts = torch.zeros(4, 4)
    for a, b in itertools.pairwise(text):
        counts[a, b] += 1
    expected = counts.sum(1, keepdim=True) * distribution(CHAIN, config)
    assert ((counts - expected) ** 2 / expected).sum() < 32.9
    assert 0.1 < source.report.acceptance_rate < 0.9
    assert source.report.proposed > 3000


@pytest.mark.parametrize("q", [[0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 1.0, 0.0], [0.25, 0.25, 0.25, 0.25], None])
def test_what_verify_lets_through_is_drawn_from_p(q):
    """One drafted token, 6,000 times; 3 degrees of freedom exceed 16.3 once in a thousand seeds."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    sampler = Sampler(SamplingConfig(seed=1), 1)
    drafting = torch.Generator().manual_seed(2)
    counts, logits = torch.zeros(4), torch.stack([p.log(), torch.zeros(4)])
    for _ in range(6000):
        if q is None:
            draft = Draft([1])
        else:
            q_row = torch.tensor([q])
            draft = Draft([int(q_row.multinomial(1, generator=drafting))], q_row)
        accepted, following = verify(logits, draft, sampler)
        counts[draft.ids[0] if accepted else following] += 1
    assert ((counts - 6000 * p) ** 2 / (6000 * p)).sum() < 16.3


def test_a_seed_gives_the_same_text_again(random_model):
    model = random_model(CONFIG)
    source = Speculative(SameWeights(model, num_experts_per_tok=2), 3)
    texts = [ids_of(stream(model, None, [1, 2, 3], source=source, seed=seed, max_new_tokens=30)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_the_report_counts():
    assert Report().acceptance_rate is None
    assert Report().tokens_per_pass is None
    assert Report().summary() == "nothing drafted"
    assert Report(passes=10, proposed=20, accepted=5).summary() == "25% of 20 drafted accepted, 1.50 tokens a pass"


def test_mistakes_are_one_line(random_model):
    model, other = random_model(CONFIG), random_model(preset("tiny", num_hidden_layers=2, vocab_size=300))
    with pytest.raises(ConfigError, match="draft_tokens is 0"):
        Speculative(PromptLookup(), 0)
    with pytest.raises(ConfigError, match="vocabulary has 300 ids and the model's has 320"):
        next(stream(model, None, [1], source=Speculative(Checkpoint(other))))
    with pytest.raises(ConfigError, match="and for no other"):
        next(stream(other, None, [1], source=Speculative(SameWeights(model, num_experts_per_tok=1))))
    with pytest.raises(ConfigError, match="it saves nothing"):
        SameWeights(model)
    with pytest.raises(ConfigError, match="expected 1 to 10"):
        SameWeights(model, num_experts_per_tok=11)
    with pytest.raises(ConfigError, match="4 experts per token saves nothing: the model itself visits 3"):
        SameWeights(model, num_experts_per_tok=4)
