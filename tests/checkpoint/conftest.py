"""Random checkpoints in the published layouts, written here by hand so that no code under test takes part in them.

`published` is the one place that knows the foreign names twice: a slip in the product's tables cannot repeat itself here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from xmoe.checkpoint.config_reading import to_model_config
from xmoe.checkpoint.config_writing import config_text
from xmoe.checkpoint.layouts import LAYOUTS
from xmoe.model.config import ModelConfig, preset

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

BASE = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "vocab_size": 160,
    "initial_context_length": 32,
    "factor": 4.0,
}


def shape_of(**changes) -> dict:
    return {**BASE, **changes}


def hf_config(shape: dict, packed: bool) -> dict:
    layers = shape["num_hidden_layers"]
    types = shape.get("layer_types") or [("full" if i % 2 else "sliding") + "_attention" for i in range(layers)]
    content = {k: v for k, v in shape.items() if k not in ("factor",)}
    content |= {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_act": "silu",
        "layer_types": types,
        "experts_per_token": shape["num_experts_per_tok"],
        "max_position_embeddings": int(shape["initial_context_length"] * shape["factor"]),
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": shape["factor"],
            "original_max_position_embeddings": shape["initial_context_length"],
            "rope_type": "yarn",
            "truncate": False,
        },
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    }
    if packed:
        content["quantization_config"] = {"quant_method": "mxfp4"}
    return content


def openai_config(shape: dict) -> dict:
    same = (
        "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads",
        "num_key_value_heads", "sliding_window", "initial_context_length",
    )  # fmt: skip
    return {k: shape[k] for k in same} | {
        "num_experts": shape["num_local_experts"],
        "experts_per_token": shape["num_experts_per_tok"],
        "swiglu_limit": 7.0,
        "rope_theta": 150000,
        "rope_scaling_factor": shape["factor"],
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return (GRID[nibbles.int()] * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


def random_tensors(shape: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """hf-mxfp4 tensors, every one of them random: no bias, norm or sink may be dropped unnoticed."""
    g = torch.Generator().manual_seed(seed)
    D, F, E, V = shape["hidden_size"], shape["intermediate_size"], shape["num_local_experts"], shape["vocab_size"]
    H, G, Dh = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]

    def matrix(out, width):
        return (torch.randn(out, width, generator=g) / width**0.5).bfloat16()

    def vector(*size, mean=0.0, std=0.3):
        return (mean + std * torch.randn(*size, generator=g)).bfloat16()

    t = {
        "model.embed_tokens.weight": vector(V, D, std=1.0),
        "model.norm.weight": vector(D, mean=1.0, std=0.2),
        "lm_head.weight": matrix(V, D),
    }
    for i in range(shape["num_hidden_layers"]):
        p = f"model.layers.{i}."
        t |= {
            p + "input_layernorm.weight": vector(D, mean=1.0, std=0.2),
            p + "post_attention_layernorm.weight": vector(D, mean=1.0, std=0.2),
            p + "self_attn.sinks": vector(H, std=1.0),
            p + "mlp.router.weight": matrix(E, D),
            p + "mlp.router.bias": vector(E),
            p + "mlp.experts.gate_up_proj_bias": vector(E, 2 * F),
            p + "mlp.experts.down_proj_bias": vector(E, D),
        }
        for name, out, width in (("q", H * Dh, D), ("k", G * Dh, D), ("v", G * Dh, D), ("o", D, H * Dh)):
            t[p + f"self_attn.{name}_proj.weight"] = matrix(out, width)
            t[p + f"self_attn.{name}_proj.bias"] = vector(out)
        for name, out, width in (("gate_up", 2 * F, D), ("down", D, F)):
            t[p + f"mlp.experts.{name}_proj_blocks"] = torch.randint(
                0, 256, (E, out, width // 32, 16), generator=g, dtype=torch.uint8
            )
            t[p + f"mlp.experts.{name}_proj_scales"] = torch.randint(
                121, 124, (E, out, width // 32), generator=g, dtype=torch.uint8
            )
    return t


def as_dense(tensors: dict) -> dict:
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            dense[stem] = dequantized(tensor, tensors[stem + "_scales"]).transpose(1, 2).contiguous().bfloat16()
        elif not name.endswith("_scales"):
            dense[name] = tensor
    return dense


def as_openai(tensors: dict) -> dict:
    out = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
    }
    layers = sum(name.endswith("self_attn.sinks") for name in tensors)
    for i in range(layers):
        hf, oa = f"model.layers.{i}.", f"block.{i}."
        for kind in ("weight", "bias"):
            out[oa + f"attn.qkv.{kind}"] = torch.cat([tensors[hf + f"self_attn.{p}_proj.{kind}"] for p in "qkv"])
            out[oa + f"attn.out.{kind}"] = tensors[hf + f"self_attn.o_proj.{kind}"]
            out[oa + f"mlp.gate.{kind}"] = tensors[hf + f"mlp.router.{kind}"]
        out[oa + "attn.sinks"] = tensors[hf + "self_attn.sinks"]
        out[oa + "attn.norm.scale"] = tensors[hf + "input_layernorm.weight"]
        out[oa + "mlp.norm.scale"] = tensors[hf + "post_attention_layernorm.weight"]
        for number, name in (("1", "gate_up"), ("2", "down")):
            out[oa + f"mlp.mlp{number}_bias"] = tensors[hf + f"mlp.experts.{name}_proj_bias"]
            for part in ("blocks", "scales"):
                out[oa + f"mlp.mlp{number}_weight.{part}"] = tensors[hf + f"mlp.experts.{name}_proj_{part}"]
    return out


def write_shards(folder: Path, tensors: dict, names: list[str]) -> None:
    """Deal the tensors out like cards, so that blocks and scales of one weight part company."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, file in enumerate(names):
        part = {k: v.contiguous() for k, v in sorted(tensors.items())[number :: len(names)]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_published(folder: Path, layout: str, shape: dict, tensors: dict) -> Path:
    if layout == "openai":
        folder.mkdir(parents=True)
        for number in range(3):
            part = dict(list(as_openai(tensors).items())[number::3])
            save_file(
                {k: v.contiguous() for k, v in part.items()}, folder / f"model--{number + 1:05d}-of-00003.safetensors"
            )
        (folder / "config.json").write_text(json.dumps(openai_config(shape)))
        return folder
    packed = layout == "hf-mxfp4"
    # the published files count from 0 and say the last number after "of"
    write_shards(
        folder, tensors if packed else as_dense(tensors), [f"model-{i:05d}-of-00002.safetensors" for i in range(3)]
    )
    (folder / "config.json").write_text(json.dumps(hf_config(shape, packed)))
    return folder


@pytest.fixture(scope="session")
def by_hand():
    """The functions above, for tests that need the tensors themselves."""
    return SimpleNamespace(
        shape_of=shape_of, hf_config=hf_config, openai_config=openai_config, tensors=random_tensors, dense=as_dense
    )


@pytest.fixture
def published(tmp_path):
    """(layout, seed=0, **shape changes) -> a folder in that layout over three shards, written once a test."""

    def write(layout: str, seed: int = 0, **changes) -> Path:
        shape = shape_of(**changes)
        folder = tmp_path / f"published-{layout}-{seed}"
        return folder if folder.exists() else write_published(folder, layout, shape, random_tensors(shape, seed))

    return write


@pytest.fixture
def everything():
    """(folder) -> all its tensors, read by the safetensors library alone."""

    def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
        return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}

    return tensors_of


@pytest.fixture
def same_bytes():
    """Two dicts of tensors have the same names, dtypes, shapes and bytes."""

    def check(a: dict, b: dict) -> None:
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
            assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name

    return check


@pytest.fixture
def gpt_oss():
    """(**changes) -> the config.json of a GPT-OSS of two layers, as published; a value of None removes the key."""

    def changed(**changes) -> dict:
        content = json.loads(config_text(preset("gpt_oss_20b", num_hidden_layers=2), LAYOUTS["hf-mxfp4"])) | changes
        return {k: v for k, v in content.items() if v is not None}

    return changed


@pytest.fixture
def read():
    """(content, experts of each layer) -> ModelConfig, and the keys that were left over."""

    def understood(content: dict, experts: list[int] | None = None) -> tuple[ModelConfig, dict]:
        layers = content["num_hidden_layers"]
        return to_model_config(content, experts or [content.get("num_local_experts", 8)] * layers, Path("config"))

    return understood


@pytest.fixture
def edit_json():
    """(file, **changes) -> rewrite a JSON object; a value of None removes the key."""

    def edit(file: Path, **changes) -> None:
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit
