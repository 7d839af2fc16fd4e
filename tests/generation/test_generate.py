"""Generation: with a cache as without, in a batch as alone, whole characters only, and a clear word when it cannot be."""

from __future__ import annotations

import pytest
import torch

from xmoe.errors import ConfigError
from xmoe.generation.cache import KVCache
from xmoe.generation.generate import PromptMemory, generate, left_padded, prefill, stream
from xmoe.model.config import preset


class Scripted:
    """A model that always continues with the given ids, whatever the prompt: for tests of what happens to the text."""

    def __init__(self, ids, vocab_size=320):
        self.config = preset("tiny", vocab_size=vocab_size, max_position_embeddings=64)
        self.device = torch.device("cpu")
        self.ids = ids
        self.passes = 0

    def features(self, tokens, cache, *, positions=None, num_experts_per_tok=None):
        if self.passes == 0:
            self.prompt = tokens.shape[1]
        self.passes += 1
        cache.advance(tokens.shape[1])
        hidden = torch.full((*tokens.shape, 1), float(cache.length - self.prompt))
        return type("Features", (), {"hidden": hidden})

    def unembed(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor([self.ids[int(h)] for h in hidden[:, 0]]), 320).float()


def greedy_without_cache(model, ids, count, k=None):
    ids, new = list(ids), []
    with torch.inference_mode():
        for _ in range(count):
            new.append(int(model(torch.tensor([ids]), num_experts_per_tok=k).logits[0, -1].argmax()))
            ids.append(new[-1])
    return new


# Numbers: the cache changes nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 8, 9, 64, 300])
def test_cached_logits_equal_the_full_forward(tiny, chunk):
    """Chunks shorter and longer than the window (8), past the original context (32) and many windows."""
    tokens = torch.randint(0, 320, (2, 90))
    with torch.inference_mode():
        full = tiny(tokens).logits
        cache = KVCache(tiny.config)
        parts = [tiny(tokens[:, s : s + chunk], cache).logits for s in range(0, 60, chunk)]
        parts += [tiny(tokens[:, s : s + 1], cache).logits for s in range(cache.length, 90)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_left_padded_batch_equals_single_rows(tiny, chunk):
    rows = [torch.randint(0, 320, (n,)).tolist() for n in (50, 1, 9, 33)]
    tokens, positions = left_padded(rows)
    cache = KVCache(tiny.config)
    logits = prefill(tiny, cache, tokens, positions, chunk=chunk)
    assert logits.isfinite().all()
    for row, got in zip(rows, logits):
        with torch.inference_mode():
            torch.testing.assert_close(got, tiny(torch.tensor([row])).logits[0, -1], atol=1e-4, rtol=0)


def test_greedy_ids_equal_those_without_a_cache(tiny):
    prompts = [torch.randint(0, 256, (n,)).tolist() for n in (5, 40, 17)]
    expected = [greedy_without_cache(tiny, p, 30) for p in prompts]
    for prompt, ids in zip(prompts, expected):
        pieces = list(stream(tiny, None, prompt, temperature=0, max_new_tokens=30))
        assert [p.token for p in pieces[:-1]] == ids
    batch = generate(tiny, None, prompts, temperature=0, max_new_tokens=30, prefill_chunk=16)
    assert [c.ids for c in batch] == expected


def test_sampled_rows_of_a_batch_equal_single_runs(tiny, tokenizer):
    """Row i of a batch draws with seed + i; stopping early and being dropped from the batch disturbs nobody."""
    prompts = ["abc", "The quick brown fox", "", "x" * 20, "two\nlines"]
    settings = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 60, "repetition_penalty": 1.1, "stop": ("q", "ab")}
    batch = generate(tiny, tokenizer, prompts, seed=7, batch_size=4, **settings)
    for i, (prompt, got) in enumerate(zip(prompts, batch)):
        alone = list(stream(tiny, tokenizer, prompt, seed=7 + i, **settings))
        assert [p.token for p in alone if p.finish_reason is None] == got.ids
        assert "".join(p.text for p in alone) == got.text
        assert alone[-1].finish_reason == got.finish_reason
    assert len({len(c.ids) for c in batch}) > 1, "all rows ended together, so nothing was tested"


@pytest.mark.parametrize(("setting", "k"), [({"num_experts_per_tok": 2}, 2), ({"reasoning_effort": "high"}, 5)])
def test_effort_and_experts_per_token_reach_the_router(tiny, setting, k):
    prompt = list(range(20))
    got = generate(tiny, None, [prompt], temperature=0, max_new_tokens=15, **setting)[0].ids
    assert got == greedy_without_cache(tiny, prompt, 15, k)
    assert got != greedy_without_cache(tiny, prompt, 15)


def test_a_prompt_that_goes_on_from_the_last_one_is_not_read_again(tiny):
    """Through the window's edge, with and without the same number of experts, and back after a long answer."""
    memory = PromptMemory()
    first = torch.randint(0, 320, (21,)).tolist()
    answer = [p.token for p in stream(tiny, None, first, memory=memory, temperature=0, max_new_tokens=40)][:-1]
    for prompt, k, remembered in (
        ([*first, *answer[:3], 5, 6], None, 21),
        ([*first, 9, 9, 9], None, 0),
        ([*first, 9, 9, 9, 10], None, 24),
        ([*first, 9, 9, 9, 10, 11], 2, 0),
        ([*first, 9, 9, 9, 10, 11], 2, 0),
    ):
        settings = {"temperature": 0, "max_new_tokens": 20, "num_experts_per_tok": k}
        *got, last = stream(tiny, None, prompt, memory=memory, **settings)
        assert last.timing.remembered_tokens == remembered
        assert [p.token for p in got] == generate(tiny, None, [prompt], **settings)[0].ids


# Text: what is shown, and when it ends ------------------------------------------------------------------------------------


def test_characters_come_whole(tokenizer):
    ids = tokenizer.encode("aé∑🙂b")
    pieces = [p.text for p in stream(Scripted(ids), tokenizer, "x", temperature=0, max_new_tokens=len(ids))]
    assert [p for p in pieces if p] == ["a", "é", "∑", "🙂", "b"]


def test_half_a_character_at_the_end_is_not_shown(tokenizer):
    ids = tokenizer.encode("a🙂")
    pieces = list(stream(Scripted(ids), tokenizer, "x", temperature=0, max_new_tokens=len(ids) - 1))
    assert "".join(p.text for p in pieces) == "a"


def test_the_end_of_document_token_ends_the_text_and_is_reported(tokenizer):
    model = Scripted([*tokenizer.encode("ok"), tokenizer.eos_id, 65])
    *_, last = pieces = list(stream(model, tokenizer, "x", temperature=0))
    assert "".join(p.text for p in pieces) == "ok"
    assert (last.finish_reason, last.token, last.timing.new_tokens) == ("stop_token", tokenizer.eos_id, 2)
    assert model.passes == 3, "no pass was made for tokens after the end"


def test_stop_tokens_replace_the_tokenizers_own(tokenizer):
    model = Scripted([tokenizer.eos_id, 66, 67, 68])
    completion = generate(model, tokenizer, [[1]], temperature=0, stop_tokens=[67])[0]
    assert (completion.ids, completion.finish_reason) == ([tokenizer.eos_id, 66], "stop_token")


def test_a_stop_string_is_never_shown_in_part(tokenizer):
    model = Scripted(tokenizer.encode("one\nEN two\nEND three"))
    pieces = list(stream(model, tokenizer, "x", temperature=0, stop="\nEND"))
    assert "".join(p.text for p in pieces) == "one\nEN two"
    assert pieces[-1].finish_reason == "stop_string"
    assert all("\nEND" not in "".join(p.text for p in pieces[:n]) for n in range(len(pieces)))


def test_length_and_context_are_told_apart(tokenizer):
    model = Scripted([65] * 100)
    assert generate(model, tokenizer, ["x"], temperature=0, max_new_tokens=5)[0].finish_reason == "length"
    full = generate(model, tokenizer, ["x" * 60], temperature=0, max_new_tokens=5)[0]
    assert (full.finish_reason, len(full.ids)) == ("context", 4)


def test_an_empty_prompt_begins_like_a_document(tiny, tokenizer):
    with_end = generate(tiny, tokenizer, [[tokenizer.eos_id]], temperature=0, max_new_tokens=6)[0].ids
    assert generate(tiny, tokenizer, [""], temperature=0, max_new_tokens=6)[0].ids == with_end


def test_timing_counts_and_rates(tiny):
    *_, last = stream(tiny, None, [1, 2, 3], temperature=0, max_new_tokens=6)
    timing = last.timing
    assert (timing.prompt_tokens, timing.new_tokens) == (3, 6)
    assert 0 < timing.first_token < timing.total
    assert timing.decode_tokens_per_second == pytest.approx(5 / (timing.total - timing.first_token))
    assert timing.prompt_tokens_per_second == pytest.approx(3 / timing.first_token)
    *_, one = stream(tiny, None, [1], temperature=0, max_new_tokens=1)
    assert one.timing.decode_tokens_per_second is None


# What cannot be -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ([1] * 512, {}, "512 tokens and the model's context is 512"),
        ([1], {"reasoning_effort": "huge"}, "unknown reasoning effort 'huge'; expected low, medium, high"),
        ([1], {"num_experts_per_tok": 11}, "10 experts a layer: expected 1 to 10"),
        ([1], {"num_experts_per_tok": 0}, "expected 1 to 10"),
        ([1], {"temperature": -1}, "temperature is -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk is 0"),
        ([1], {"stop": ("a", "")}, "stop string is empty"),
        ([1], {"overflow": "wrap"}, "overflow is 'wrap'"),
        ([1], {"max_tokens": 5}, "unknown setting 'max_tokens'"),
        ([], {}, "no tokens"),
        ([320], {}, "token 320; the model's vocabulary is 0 to 319"),
        ("text", {}, "needs a tokenizer"),
    ],
)
def test_mistakes_are_one_line_at_the_call(tiny, prompt, settings, says):
    for call in (lambda: stream(tiny, None, prompt, **settings), lambda: generate(tiny, None, [prompt], **settings)):
        with pytest.raises(ConfigError) as error:
            call()
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_truncation_forgets_the_beginning(tiny):
    long = torch.randint(0, 320, (700,)).tolist()
    kept = generate(tiny, None, [long], overflow="truncate", temperature=0, max_new_tokens=12)[0]
    assert kept.timing.prompt_tokens == 500
    assert kept.ids == generate(tiny, None, [long[-500:]], temperature=0, max_new_tokens=12)[0].ids
    greedy = generate(
        tiny, None, [long], overflow="truncate", temperature=0, max_new_tokens=4000, stop_tokens=range(320)
    )
    assert greedy[0].timing.prompt_tokens == 256, "half of the context stays, however much is asked for"
