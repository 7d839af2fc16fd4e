"""mlx-lm, where it is installed, opens the packed export and computes the same.

With plain RoPE only: mlx-lm rounds YaRN's bounds to whole pairs, which GPT-OSS does not.
"""

import pytest
import torch

from xmoe.checkpoint.weights import convert, load

mx = pytest.importorskip("mlx.core")
mlx_utils = pytest.importorskip("mlx_lm.utils")


@torch.no_grad()
def test_the_packed_export_computes_the_same(published, tmp_path):
    import numpy

    folder = published("openai", factor=1.0, initial_context_length=512)
    convert(folder, tmp_path / "export", "hf-mxfp4")
    tokens = torch.randint(160, (1, 70), generator=torch.Generator().manual_seed(1))
    ours = load(folder, dtype="float32", experts="dense")[0](tokens).logits
    model, _ = mlx_utils.load_model(tmp_path / "export")
    model.set_dtype(mx.float32)
    theirs = torch.from_numpy(numpy.array(model(mx.array(tokens.numpy()))))
    assert (ours - theirs).abs().max() <= 1e-4
