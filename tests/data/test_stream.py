from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xmoe.config import load_config
from xmoe.data.stream import IGNORED, DataConfig, TrainBatches, ValidationBatches, load_data
from xmoe.data.tokenizer import Tokenizer
from xmoe.data.tokens import TokenArray
from xmoe.errors import ConfigError, DataError

from .conftest import prose

EOS = 999


def numbered(n: int, documents: int = 3) -> TokenArray:
    """Token i is i, so that a window tells where it was cut; the documents' bytes are made up."""
    ends = np.linspace(0, n, documents + 1).astype(np.int64)[1:]
    return TokenArray(np.arange(n, dtype=np.uint16), np.stack([ends, 5 * ends], axis=1), EOS)


def take(batches, n: int) -> list[list]:
    return [next(batches).inputs.tolist() for _ in range(n)]


@given(st.integers(6, 200), st.integers(1, 5), st.integers(0, 2**64 - 1))
def test_a_pass_sees_each_window_once(n, seq_len, seed):
    stream = TrainBatches(numbered(n), seq_len, 1, seed=seed)
    starts = []
    while stream.epochs < 1:
        inputs, targets = next(stream)
        assert targets.tolist() == [[i + 1 for i in inputs[0].tolist()]]
        starts.append(int(inputs[0, 0]))
    starts.sort()
    assert starts == list(range(starts[0], n - seq_len, seq_len))
    assert starts[0] < seq_len
    assert stream.tokens_seen == seq_len * len(starts)


def test_passes_differ_in_offset_and_order():
    stream = TrainBatches(numbered(101), 5, 1, seed=3)
    passes = []
    for last in (1, 2, 3, 4):
        starts = []
        while stream.epochs < last:
            starts.append(int(next(stream).inputs[0, 0]))
        passes.append(starts)
    assert len({starts[0] % 5 for starts in passes}) > 1
    assert all(starts != sorted(starts) for starts in passes)
    assert len({tuple(np.argsort(starts)) for starts in passes}) == 4


def test_a_batch_is_its_rows():
    """A pass may end within a batch: the rows do not depend on how they are gathered."""
    single = TrainBatches(numbered(40), 6, 1, seed=2)
    five = TrainBatches(numbered(40), 6, 5, seed=2)
    for batch in take(five, 6):
        assert batch == [row for (row,) in take(single, 5)]


def test_the_seed_decides_the_order():
    def first(seed):
        return take(TrainBatches(numbered(300), 7, 2, seed=seed), 30)

    assert first(1) == first(1)
    assert first(1) != first(2)


@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 3))
def test_resuming_is_exact_at_any_position(done, batch_size, world_size):
    def stream(seed=11):
        return TrainBatches(numbered(83), 6, batch_size, seed=seed, rank=world_size - 1, world_size=world_size)

    never_stopped = stream()
    take(never_stopped, done)
    state = never_stopped.state_dict()
    expected = take(never_stopped, 9)
    resumed = stream(seed=12)
    resumed.load_state_dict(state)
    assert resumed.tokens_seen == done * batch_size * world_size * 6
    assert take(resumed, 9) == expected
    assert resumed.state_dict() == never_stopped.state_dict()
    assert resumed.epochs == never_stopped.epochs


def test_a_position_survives_torch_save(tmp_path):
    stream = TrainBatches(numbered(83), 6, 2)
    take(stream, 5)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == stream.state_dict()


def test_another_text_or_length_cannot_be_resumed():
    state = TrainBatches(numbered(83), 6, 2).state_dict()
    with pytest.raises(DataError, match="cannot resume: the training tokens are not those"):
        TrainBatches(numbered(84), 6, 2).load_state_dict(state)
    with pytest.raises(DataError, match=r"had data\.seq_len 6, this one 5"):
        TrainBatches(numbered(83), 5, 2).load_state_dict(state)


@given(st.integers(1, 3), st.integers(1, 4))
def test_ranks_share_the_rows_of_the_batch(batch_size, world_size):
    """Under one another, the ranks' batches are the single process's batch: disjoint and covering."""
    whole = TrainBatches(numbered(150), 4, batch_size * world_size, seed=5)
    ranks = [
        TrainBatches(numbered(150), 4, batch_size, seed=5, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for _ in range(20):
        assert [row for rank in ranks for row in take(rank, 1)[0]] == take(whole, 1)[0]
    assert {rank.tokens_seen for rank in ranks} == {whole.tokens_seen} == {20 * 4 * batch_size * world_size}


def test_batches_are_int64_and_contiguous():
    batch = next(TrainBatches(numbered(50), 6, 3))
    for part in batch:
        assert part.shape == (3, 6)
        assert part.dtype == torch.int64
        assert part.is_contiguous()


def test_one_window_is_enough_and_less_is_not():
    stream = TrainBatches(numbered(7), 6, 2)
    assert take(stream, 3) == [[list(range(6))] * 2] * 3
    assert stream.epochs == 6
    with pytest.raises(DataError, match=r"data\.seq_len 7 is longer than the text: 7 training tokens, 8 needed"):
        TrainBatches(numbered(7), 7, 2)


@given(st.integers(1, 120), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_validation_scores_every_token_once(n, seq_len, batch_size, world_size):
    tokens = numbered(n, documents=1)
    ranks = [ValidationBatches(tokens, seq_len, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    scored = []
    for step in zip(*ranks, strict=True):
        for batch in step:
            assert batch.inputs.shape == batch.targets.shape == (batch_size, seq_len)
            real = batch.targets != IGNORED
            scored += batch.targets[real].tolist()
            context = batch.inputs[real].tolist()
            assert context == [t - 1 if t else EOS for t in batch.targets[real].tolist()]
    assert scored == list(range(n))
    assert all(len(rank) == len(list(rank)) for rank in ranks)
    assert ranks[0].scored_tokens == n
    assert ranks[0].bytes_per_token == 5 * n / n
    assert [b.targets.tolist() for b in ranks[0]] == [b.targets.tolist() for b in ranks[0]]


# --- load_data ------------------------------------------------------------------------------------------------------


def decoded(data, array):
    """The documents in a token array, as text."""
    parts, start = [], 0
    for end, _ in array.documents.tolist():
        parts.append(data.tokenizer.decode(array.ids[start : end - 1].tolist()))
        start = end
    return parts


def test_documents_are_divided_for_good(text_folder):
    config = DataConfig(source=str(text_folder), tokenizer="bytes", seq_len=16, validation_fraction=0.3)
    data = load_data(config)
    train, held_out = decoded(data, data.train), decoded(data, data.validation)
    texts = {f.read_text(encoding="utf-8") for f in text_folder.rglob("*.txt")}
    assert set(train) | set(held_out) == texts
    assert not set(train) & set(held_out)
    assert 3 <= len(held_out) <= 15
    for i, file in enumerate(sorted(text_folder.rglob("*.txt"))):  # other names, so another order
        file.rename(text_folder / f"{97 * i % 31}-new.txt")
    again = load_data(config)
    assert set(decoded(again, again.train)) == set(train) != train
    assert set(decoded(again, again.validation)) == set(held_out)


def test_bytes_per_token_is_exact(text_folder):
    data = load_data(DataConfig(source=str(text_folder), vocab_size=300, seq_len=16, validation_fraction=0.3))
    batches = data.validation_batches(3)
    texts = decoded(data, data.validation)
    size = sum(len(t.encode()) for t in texts)
    scored = sum(int((b.targets != IGNORED).sum()) for b in batches)
    assert math.isclose(batches.bytes_per_token, size / scored, rel_tol=1e-12)
    assert scored == sum(len(data.tokenizer.encode(t)) + 1 for t in texts)
    assert size / scored > 1.5


def test_a_single_file_has_documents_to_hold_out(tmp_path):
    (tmp_path / "book.txt").write_text(prose(150), encoding="utf-8")
    data = load_data(DataConfig(source=str(tmp_path / "book.txt"), tokenizer="bytes", seq_len=16))
    assert len(data.validation.documents) >= 1
    assert sorted("".join(decoded(data, data.train) + decoded(data, data.validation))) == sorted(prose(150))


def test_validation_text_of_its_own(text_folder, tmp_path):
    (tmp_path / "own.txt").write_text(prose(2, seed=99), encoding="utf-8")
    config = DataConfig(
        source=str(text_folder), tokenizer="bytes", seq_len=16, validation_source=str(tmp_path / "own.txt")
    )
    data = load_data(config)
    assert len(data.train.documents) == 30
    assert decoded(data, data.validation) == [prose(2, seed=99)]


def test_fewer_validation_tokens(text_folder):
    config = DataConfig(source=str(text_folder), tokenizer="bytes", seq_len=16, validation_fraction=0.3)
    whole = load_data(config).validation
    some = load_data(dataclasses.replace(config, validation_tokens=500)).validation
    assert 500 <= len(some) < len(whole)
    assert some.ids.tolist() == whole.ids[: len(some)].tolist()


def test_no_validation(text_folder):
    data = load_data(DataConfig(source=str(text_folder), tokenizer="bytes", seq_len=16, validation_fraction=0.0))
    assert data.validation is None
    assert len(data.train.documents) == 30
    with pytest.raises(DataError, match=r"nothing is held out.*data\.validation_fraction"):
        data.validation_batches(2)


def test_the_tokenizer_is_trained_on_training_text_only(text_folder, monkeypatch):
    seen = []
    original = Tokenizer.train.__func__
    monkeypatch.setattr(
        Tokenizer,
        "train",
        classmethod(lambda cls, texts, size: original(cls, seen.extend(t := list(texts)) or t, size)),
    )
    config = DataConfig(source=str(text_folder), vocab_size=290, seq_len=16, validation_fraction=0.3)
    data = load_data(config)
    assert data.tokenizer.vocab_size == 290
    assert seen == decoded(data, data.train)
    seen.clear()
    assert load_data(config).tokenizer.fingerprint == data.tokenizer.fingerprint
    assert seen == []


def test_tokenizers_by_path_and_by_hand(text_folder, tmp_path, monkeypatch):
    path = Tokenizer.train([prose(3)], 280).save(tmp_path / "kept")
    config = DataConfig(source=str(text_folder), seq_len=16, tokenizer=str(path))
    assert load_data(config).tokenizer.vocab_size == 280
    assert load_data(config, Tokenizer.of_bytes()).tokenizer.vocab_size == 264
    for name in ("absent", "no/such/tokenizer", "some/tokenizer.json", "some/o200k.tiktoken"):
        with pytest.raises(DataError, match=f"no tokenizer at {name}"):
            load_data(dataclasses.replace(config, tokenizer=name))
    asked = []
    monkeypatch.setattr(Tokenizer, "from_hub", lambda name: asked.append(name) or Tokenizer.of_bytes())
    assert load_data(dataclasses.replace(config, tokenizer="org/model-0.5B")).tokenizer.vocab_size == 264
    assert asked == ["org/model-0.5B"]


def test_a_hub_dataset_with_its_own_validation_split(monkeypatch, cache):
    import sys
    import types

    hub = types.ModuleType("datasets")
    hub.get_dataset_config_names = lambda name: ["default"]
    hub.load_dataset = lambda name, subset, split, streaming: [{"text": f"{split} row {i}"} for i in range(4)]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    config = DataConfig(source="org/name", tokenizer="bytes", seq_len=8, validation_split="test")
    data = load_data(config)
    assert decoded(data, data.train) == [f"train row {i}" for i in range(4)]
    assert decoded(data, data.validation) == [f"test row {i}" for i in range(4)]
    monkeypatch.setitem(sys.modules, "datasets", None)  # from now on the network is gone
    again = load_data(config)
    assert again.train.fingerprint == data.train.fingerprint


def test_a_split_needs_a_hub_dataset(text_folder):
    with pytest.raises(ConfigError, match=r"data\.validation_split names a split of a hub dataset, but .* is local"):
        load_data(DataConfig(source=str(text_folder), tokenizer="bytes", seq_len=8, validation_split="test"))


def test_text_shorter_than_a_sequence(tmp_path):
    (tmp_path / "short.txt").write_text("only a few words")
    config = DataConfig(source=str(tmp_path / "short.txt"), tokenizer="bytes", seq_len=64, validation_fraction=0.0)
    with pytest.raises(DataError, match=r"data\.seq_len 64 is longer than the text: 17 training tokens, 65 needed"):
        load_data(config)
    with pytest.raises(DataError, match="single document"):
        load_data(dataclasses.replace(config, validation_fraction=0.05))


def test_everything_held_out(text_folder):
    config = DataConfig(source=str(text_folder), tokenizer="bytes", seq_len=8, validation_fraction=1 - 1e-12)
    with pytest.raises(DataError, match=r"all of .* is held out; lower data\.validation_fraction"):
        load_data(config)


def test_the_default_needs_nothing_but_python():
    data = load_data(DataConfig(max_bytes=400_000, seq_len=32, vocab_size=600))
    assert data.tokenizer.vocab_size == 600
    assert len(data.train) > 50_000
    assert len(data.validation) > 0
    inputs, targets = next(data.train_batches(3))
    assert inputs[:, 1:].tolist() == targets[:, :-1].tolist()
    assert int(inputs.max()) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 0}, "data.seq_len must be at least 1, found 0"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction must be in \[0, 1\), found 1.0"),
        ({"vocab_size": 100}, "data.vocab_size 100 is too small"),
        ({"max_bytes": 0}, "data.max_bytes must be at least 1"),
        ({"validation_tokens": -5}, "data.validation_tokens must be at least 1"),
        ({"document_separator": ""}, "data.document_separator is empty"),
    ],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**change)


def test_ranks_and_sizes_that_cannot_work():
    for batch_size, rank, world_size in ((0, 0, 1), (2, 2, 2), (2, -1, 1)):
        for kind in (TrainBatches, ValidationBatches):
            with pytest.raises(ConfigError, match=f"no batches of {batch_size} rows for rank {rank} of {world_size}"):
                kind(numbered(50), 4, batch_size, rank=rank, world_size=world_size)


def test_the_config_is_filled_from_yaml(tmp_path):
    (tmp_path / "data.yaml").write_text("source: some/dir\nmax_bytes: 4e6\nvalidation_fraction: 1e-2\nsubset: null\n")
    config = load_config(DataConfig, tmp_path / "data.yaml", ["seq_len=64"])
    assert config == DataConfig(source="some/dir", max_bytes=4_000_000, validation_fraction=0.01, seq_len=64)
