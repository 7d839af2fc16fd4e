"""The network against transformers' GptOssForCausalLM, value for value and gradient for gradient."""

from __future__ import annotations

import pytest
import torch

from xmoe.errors import ConfigError
from xmoe.model.config import FULL, SLIDING, ModelConfig, preset
from xmoe.model.describe import describe
from xmoe.model.transformer import build

SHAPES = {
    # name: (config, sequence length); lengths go beyond twice the window and beyond the original context
    "tiny": (preset("tiny"), 70),
    "odd experts, layer types of its own": (
        preset("tiny", num_experts=5, num_experts_per_tok=3, reasoning_effort=None, num_hidden_layers=3,
               layer_types=(FULL, SLIDING, SLIDING)),
        40,
    ),
    "head geometry of 20b": (
        ModelConfig(vocab_size=211, hidden_size=180, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=1,
                    head_dim=64, intermediate_size=96, num_experts=6, num_experts_per_tok=4, sliding_window=16,
                    max_position_embeddings=4096, initial_context_length=64, rope_theta=150000.0,
                    rope_scaling_factor=32.0),
        100,
    ),
    "YaRN far beyond its context": (
        preset("tiny", initial_context_length=64, rope_scaling_factor=32.0, max_position_embeddings=2048, head_dim=20),
        400,
    ),
    "tied, plain RoPE, one expert a token": (
        preset("tiny", tie_word_embeddings=True, rope_scaling_factor=1.0, num_experts_per_tok=1,
               num_key_value_heads=3, reasoning_effort=None),
        50,
    ),
    "window of the published models": (preset("tiny", sliding_window=128, initial_context_length=128), 300),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name, random_model, peer):
    config, length = SHAPES[name]
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens).logits, peer(model)(tokens).logits
    assert theirs.std() > 0.3  # a fixture whose logits are near zero would prove nothing
    bound = 2e-5 if name.startswith("window") else 1e-4
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)


def test_gradients_equal_transformers(random_model, peer):
    config = preset("tiny")
    model = random_model(config).train()
    theirs = peer(model).train()
    tokens = torch.randint(config.vocab_size, (3, 30))
    targets = torch.randint(config.vocab_size, (3, 30))
    for network in (model, theirs):
        logits = network(tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for ours, layer in zip(model.blocks, theirs.model.layers):
        pairs = [
            (ours.attn.sinks.grad, layer.self_attn.sinks.grad),
            (ours.attn.out.weight.grad, layer.self_attn.o_proj.weight.grad),
            (ours.attn.qkv.bias.grad[: 6 * 12], layer.self_attn.q_proj.bias.grad),
            (ours.moe.router.weight.grad, layer.mlp.router.weight.grad),
            (ours.moe.experts.gate_up.grad, layer.mlp.experts.gate_up_proj.grad.transpose(1, 2)),
            (ours.moe.experts.gate_up_bias.grad, layer.mlp.experts.gate_up_proj_bias.grad),
            (ours.moe.experts.down.grad, layer.mlp.experts.down_proj.grad.transpose(1, 2)),
            (ours.moe.experts.down_bias.grad, layer.mlp.experts.down_proj_bias.grad),
            (ours.moe_norm.weight.grad, layer.post_attention_layernorm.weight.grad),
        ]
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(model.embed.weight.grad, theirs.model.embed_tokens.weight.grad, atol=1e-6, rtol=1e-3)


def test_router_logits_equal_transformers(random_model, peer):
    config = preset("tiny")
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (2, 33))
    with torch.no_grad():
        ours = model(tokens).routing
        theirs = peer(model)(tokens, output_router_logits=True).router_logits
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.logits, b.view(a.logits.shape), atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32(random_model):
    config = preset("tiny", num_experts=8, num_experts_per_tok=4)
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (4, 60))
    with torch.no_grad():
        exact = model(tokens).logits
        rounded = model.bfloat16()(tokens).logits.float()
    assert (rounded - exact).norm() / exact.norm() <= 0.06
    assert (rounded.argmax(-1) == exact.argmax(-1)).float().mean() >= 0.85


def test_a_changed_token_reaches_exactly_the_window_in_layer_0(random_model):
    config = preset("tiny", num_hidden_layers=1, layer_types=(SLIDING,))
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (1, 40))
    changed = tokens.clone()
    changed[0, 11] = (tokens[0, 11] + 1) % config.vocab_size
    with torch.no_grad():
        moved = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0] > 1e-6
    W = config.sliding_window
    assert moved.nonzero().flatten().tolist() == list(range(11, 11 + W))


def test_left_padding_changes_nothing(random_model):
    config = preset("tiny")
    model = random_model(config)
    short, long = torch.randint(config.vocab_size, (1, 19)), torch.randint(config.vocab_size, (1, 31))
    pad = 31 - 19
    batch = torch.cat((torch.cat((torch.zeros(1, pad, dtype=torch.long), short), 1), long))
    positions = torch.arange(31).expand(2, 31).clone()
    positions[0] = torch.cat((torch.full((pad,), -1), torch.arange(19)))
    with torch.no_grad():
        together = model(batch, positions=positions).logits
        torch.testing.assert_close(together[0, pad:], model(short).logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together[1], model(long).logits[0], atol=1e-4, rtol=0)
    assert torch.isfinite(together).all()


def test_activation_checkpointing_gives_the_same_gradients(random_model):
    config = preset("tiny")
    model = random_model(config).train()
    tokens = torch.randint(config.vocab_size, (2, 20))
    grads = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        out = model(tokens)
        out.logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        assert len(out.routing) == config.num_hidden_layers
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_experts_per_token_can_be_set_per_call_and_per_layer(random_model):
    config = preset("tiny")
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (2, 9))
    assert [r.indices.shape[1] for r in model(tokens, num_experts_per_tok=5).routing] == [5] * 4
    assert [r.indices.shape[1] for r in model(tokens, num_experts_per_tok=[1, 2, 3, 4]).routing] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="expected 1 to 10"):
        model(tokens, num_experts_per_tok=11)
    with pytest.raises(ConfigError, match="lists 2 layers; expected 4"):
        model(tokens, num_experts_per_tok=[1, 2])


def test_output_norms_are_the_lengths_of_expert_outputs(random_model):
    config = preset("tiny", num_hidden_layers=1)
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (2, 7))
    with torch.no_grad():
        routing = model(tokens, norms=True).routing[0]
        assert model(tokens).routing[0].output_norm is None
        seen = {}
        experts = model.blocks[0].moe.experts
        handle = model.blocks[0].moe_norm.register_forward_hook(lambda m, i, out: seen.update(x=out))
        model(tokens)
        handle.remove()
        x = seen["x"].view(14, -1)
        for t in range(14):
            for slot in range(3):
                e = int(routing.indices[t, slot])
                h = x[t] @ experts.gate_up[e].T + experts.gate_up_bias[e]
                gate, up = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
                f = experts.down[e] @ (gate * torch.sigmoid(1.702 * gate) * (up + 1)) + experts.down_bias[e]
                torch.testing.assert_close(routing.output_norm[t, slot], f.norm(), atol=1e-5, rtol=1e-5)


def test_build_is_deterministic_and_describes_itself():
    a, b, c = build("tiny", seed=1), build("tiny", seed=1), build("tiny", seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    d = describe(a)
    assert d.parameters == sum(p.numel() for p in a.parameters()) and d.bytes == 4 * d.parameters
    assert d.active_parameters == d.parameters - 4 * 7 * (3 * 64 * 96 + 2 * 96 + 64) - 320 * 64
    assert "10 experts, 3 a token" in str(d)
    with pytest.raises(ConfigError, match="unknown preset 'tyni'"):
        build("tyni")
