"""The model's own answers as calibration text: a cut judged on prompts alone forgets how answers are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from xmoe.compression.layerwise import as_batches
from xmoe.generation.generate import generate
from xmoe.model.transformer import Transformer


def with_answers(model: Transformer, batches: Iterable, new_tokens: int = 128, seed: int = 0) -> Iterator[Tensor]:
    """Each row of `batches` as a prompt, and what the model says to it at temperature 1: token ids [1, S], one a row.

    A prompt gives way where prompt and answer together would pass the model's context: its first tokens stay.
    """
    room = model.config.max_position_embeddings - new_tokens
    for batch in as_batches(batches):
        for i, row in enumerate(batch.tokens):
            ids = (row if batch.mask is None else row[batch.mask[i]]).tolist()[: max(1, room)]
            if ids:
                (done,) = generate(model, None, [ids], max_new_tokens=new_tokens, temperature=1.0, seed=seed)
                yield torch.tensor([[*ids, *done.ids]])
