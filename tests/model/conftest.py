"""transformers' GptOssForCausalLM with our weights, as referee."""

from __future__ import annotations

import pytest
import torch

from xmoe.model.config import ModelConfig


def to_peer(model):
    """The same network in transformers (fp32, eager attention)."""
    transformers = pytest.importorskip("transformers")
    c: ModelConfig = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling_factor > 1:
        rope = {
            "rope_type": "yarn", "rope_theta": c.rope_theta, "factor": c.rope_scaling_factor, "truncate": False,
            "beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow,
            "original_max_position_embeddings": c.initial_context_length,
        }  # fmt: skip
    config = transformers.GptOssConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, num_local_experts=c.num_experts,
        num_experts_per_tok=c.num_experts_per_tok, sliding_window=c.sliding_window, layer_types=list(c.layer_types),
        max_position_embeddings=c.max_position_embeddings, rope_parameters=rope, rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings, attn_implementation="eager",
    )  # fmt: skip
    peer = transformers.GptOssForCausalLM(config).eval()
    H, G, Dh = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    with torch.no_grad():
        peer.model.embed_tokens.weight.copy_(model.embed.weight)
        peer.model.norm.weight.copy_(model.norm.weight)
        if model.head is not None:
            peer.lm_head.weight.copy_(model.head.weight)
        for ours, theirs in zip(model.blocks, peer.model.layers):
            theirs.input_layernorm.weight.copy_(ours.attn_norm.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.moe_norm.weight)
            parts = zip(
                (theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj),
                ours.attn.qkv.weight.split([H * Dh, G * Dh, G * Dh]),
                ours.attn.qkv.bias.split([H * Dh, G * Dh, G * Dh]),
            )
            for projection, weight, bias in parts:
                projection.weight.copy_(weight)
                projection.bias.copy_(bias)
            theirs.self_attn.o_proj.weight.copy_(ours.attn.out.weight)
            theirs.self_attn.o_proj.bias.copy_(ours.attn.out.bias)
            theirs.self_attn.sinks.copy_(ours.attn.sinks)
            theirs.mlp.router.weight.copy_(ours.moe.router.weight)
            theirs.mlp.router.bias.copy_(ours.moe.router.bias)
            experts = ours.moe.experts
            theirs.mlp.experts.gate_up_proj.copy_(experts.gate_up.transpose(1, 2))
            theirs.mlp.experts.gate_up_proj_bias.copy_(experts.gate_up_bias)
            theirs.mlp.experts.down_proj.copy_(experts.down.transpose(1, 2))
            theirs.mlp.experts.down_proj_bias.copy_(experts.down_bias)
    return peer


@pytest.fixture
def peer():
    """model -> transformers' model with the same weights."""
    return to_peer
