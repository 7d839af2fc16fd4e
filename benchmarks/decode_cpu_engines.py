"""The engines that decode_cpu.py compares, one a process: each loads, reads a prompt at once, then a token at a time.

Imports nothing but the standard library and what the engine needs, so that a peer may run in another interpreter, where
xmoe is not installed. Prints one JSON object on the last line of its standard output; with "turns" it stays, and answers
each line of its standard input, "decode" or "prefill", with the seconds that took.

    python benchmarks/decode_cpu_engines.py ENGINE FOLDER '{"prompt": 512, "tokens": 32, ...}'
    python benchmarks/decode_cpu_engines.py convert FOLDER '{"converter": "convert.py", "gguf": "out", "rest": "bf16"}'
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import random
import resource
import runpy
import sys
import time
from pathlib import Path

SHORT = 16  # tokens of the prompt behind which decoding is timed
WARM = 4  # tokens decoded before the clock counts


class Xmoe:
    """Ours as it loads by itself; `portable`, in PyTorch alone; or with what else `xmoe.load` has to offer."""

    distribution = "xmoe"

    def __init__(self, folder: Path, options: dict, portable: bool = False, **choices):
        import torch

        import xmoe
        from xmoe.generation.cache import KVCache
        from xmoe.kernels import dispatch

        torch.set_num_threads(options["threads"])
        self._torch, self._model = torch, xmoe.load(folder, **choices)[0]
        self._forced = contextlib.ExitStack()
        if portable:
            self._forced.enter_context(dispatch.use("portable"))
        self.path = dispatch.describe("cpu", torch.bfloat16)
        self._new_cache = lambda: KVCache(self._model.config, reserve=options["context"])
        self.reset()

    def reset(self) -> None:
        self._cache = self._new_cache()

    def feed(self, tokens: list[int]) -> int:
        with self._torch.inference_mode():
            hidden = self._model.features(self._torch.tensor([tokens]), self._cache).hidden
            self._logits = self._model.unembed(hidden[:, -1:])[0, -1]
            return int(self._logits.argmax())

    def logits(self) -> list[float]:
        return self._logits.float().tolist()


class Transformers:
    """The experts dequantized to bf16, which is all that transformers does on a CPU; the two faster of its three ways."""

    distribution = "transformers"

    def __init__(self, folder: Path, options: dict, implementation: str):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache, Mxfp4Config

        torch.set_num_threads(options["threads"])
        self._torch, self._new_cache = torch, DynamicCache
        self._model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            quantization_config=Mxfp4Config(dequantize=True),
            experts_implementation=implementation,
        ).eval()
        self.path = f"experts dequantized to bf16, experts_implementation {implementation}"
        self.reset()

    def reset(self) -> None:
        self._cache = self._new_cache(config=self._model.config)

    def feed(self, tokens: list[int]) -> int:
        with self._torch.inference_mode():
            ids = self._torch.tensor([tokens])
            self._logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            return int(self._logits.argmax())

    def logits(self) -> list[float]:
        return self._logits.float().tolist()


class LlamaCpp:
    """llama.cpp through the C interface that llama-cpp-python exposes, weights repacked at load where it can.

    rest: what holds whatever is no expert, bf16 as in the checkpoint, or q8_0 as in the files that people share.
    """

    distribution = "llama-cpp-python"

    def __init__(self, folder: Path, options: dict, rest: str = "bf16"):
        import llama_cpp
        import numpy

        self._llama, self._numpy, messages = llama_cpp, numpy, []
        self._log = llama_cpp.llama_log_callback(
            lambda _level, text, _data: messages.append(text.decode(errors="replace"))
        )
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.use_extra_bufts = True
        self._model = llama_cpp.llama_model_load_from_file(options["gguf"][rest].encode(), how)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not open the file: {' '.join(messages[-3:]).strip()}")
        run = llama_cpp.llama_context_default_params()
        run.n_ctx, run.n_batch, run.n_ubatch = options["context"], options["prompt"], options["prompt"]
        run.n_threads = run.n_threads_batch = options["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, run)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context: {' '.join(messages[-3:]).strip()}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        repacked = [m.split()[-2] for m in messages if "CPU_REPACK model buffer size" in m]
        self.path = f"{repacked[0]} MiB repacked" if repacked else "nothing repacked"
        self.reset()

    def reset(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def feed(self, tokens: list[int]) -> int:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if code := self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode answers {code}")
        pointer = self._llama.llama_get_logits_ith(self._context, -1)
        self._logits = self._numpy.ctypeslib.as_array(pointer, shape=(self._vocabulary,))
        return int(self._logits.argmax())

    def logits(self) -> list[float]:
        return self._logits.tolist()


class Mlx:
    """mlx-lm on the CPU, experts kept in MXFP4."""

    distribution = "mlx-lm"

    def __init__(self, folder: Path, options: dict):
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        mx.set_default_device(mx.cpu)
        self._mx, self._new_cache = mx, make_prompt_cache
        self._model, _ = load_model(folder)
        self.path = "MXFP4 experts, CPU device"
        self.reset()

    def reset(self) -> None:
        self._cache = self._new_cache(self._model)

    def feed(self, tokens: list[int]) -> int:
        self._logits = self._model(self._mx.array([tokens]), cache=self._cache)[0, -1]
        return int(self._logits.argmax().item())

    def logits(self) -> list[float]:
        return self._logits.astype(self._mx.float32).tolist()


ENGINES = {
    "xmoe": Xmoe,
    "xmoe huge pages": lambda folder, options: Xmoe(folder, options, huge_pages=True),
    "xmoe int8": lambda folder, options: Xmoe(folder, options, projections="int8"),
    "xmoe int8 huge pages": lambda folder, options: Xmoe(folder, options, projections="int8", huge_pages=True),
    "xmoe portable": lambda folder, options: Xmoe(folder, options, portable=True),
    "transformers eager": lambda folder, options: Transformers(folder, options, "eager"),
    "transformers grouped_mm": lambda folder, options: Transformers(folder, options, "grouped_mm"),
    "llama.cpp": LlamaCpp,
    "llama.cpp q8_0": lambda folder, options: LlamaCpp(folder, options, "q8_0"),
    "mlx-lm": Mlx,
}
DISTRIBUTIONS = {name: name.split()[0].replace("llama.cpp", "llama-cpp-python") for name in ENGINES}


def measure(engine, ids: list[int], tokens: int, seconds: float) -> dict:
    """Seconds of two prefills of `ids` and of up to `tokens` single tokens, about `seconds` of decoding at most.

    Where the whole prompt would take too long, the reading is that of the short one, and `prefill_tokens` says so. The
    first pass over either prompt is not among `prefill_seconds`; that over the short one is `first_prompt_seconds`.
    `logits` are those behind the short prompt, to compare engines by.
    """

    short = ids[:SHORT]
    answer = {
        "first_prompt_seconds": read(engine, short)
    }  # pays for pages, caches, and experts decoded when first used
    answer["logits"] = engine.logits()
    spent = read(engine, short)
    if spent / len(short) * len(ids) > 2 * seconds:
        answer |= {"prefill_tokens": len(short), "prefill_seconds": [spent]}
    else:
        answer |= {"prefill_tokens": len(ids), "prefill_seconds": [read(engine, ids) for _ in range(3)][1:]}
    return answer | {"decode_seconds": decode(engine, ids, tokens, seconds)}


def read(engine, prompt: list[int]) -> float:
    """Seconds of one pass over a prompt, from nothing."""
    engine.reset()
    start = time.perf_counter()
    engine.feed(prompt)
    return time.perf_counter() - start


def decode(engine, ids: list[int], tokens: int, seconds: float) -> list[float]:
    """Seconds of each of up to `tokens` single tokens behind the short prompt, two at least, a few before them uncounted."""
    engine.reset()
    engine.feed(ids[:SHORT])
    token, spent, stop = ids[0], [], time.perf_counter() + seconds
    while len(spent) < WARM + 2 or (len(spent) < WARM + tokens and time.perf_counter() < stop):
        start = time.perf_counter()
        token = engine.feed([token])
        spent.append(time.perf_counter() - start)
    return spent[WARM:]


def convert(folder: Path, converter: str, gguf: str, rest: str) -> None:
    """llama.cpp's own convert_hf_to_gguf.py, as it is; without a tokenizer in the folder the vocabulary stays a mere count."""
    sys.path.insert(0, str(Path(converter).resolve().parent))
    if not (folder / "tokenizer.json").is_file():
        from conversion.gpt_oss import GptOssModel  # a package beside the converter

        def count_only(model) -> None:
            model.gguf_writer.add_tokenizer_model("none")
            model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

        GptOssModel.set_vocab = count_only
    sys.argv = [converter, str(folder), "--outfile", gguf, "--outtype", rest]
    with contextlib.redirect_stdout(sys.stderr):
        runpy.run_path(converter, run_name="__main__")


def peak_bytes() -> int:
    """High-water mark of this process alone; getrusage would count what its parent had when it was forked."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def main() -> int:
    name, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if name == "convert":
        convert(folder, **options)
        return 0
    try:
        start = time.perf_counter()
        engine = ENGINES[name](folder, options)
    except ImportError as error:
        print(json.dumps({"left_out": f"{type(error).__name__}: {error}"[:300]}))
        return 0
    loaded = time.perf_counter() - start
    draw = random.Random(0)
    ids = [draw.randrange(options["vocab_size"]) for _ in range(options["prompt"])]
    answer = measure(engine, ids, options["tokens"], options["seconds"])
    answer |= {"path": engine.path, "load_seconds": loaded, "peak_bytes": peak_bytes()}
    answer["first_token_seconds"] = loaded + answer.pop("first_prompt_seconds")
    print(json.dumps(answer | {"version": importlib.metadata.version(DISTRIBUTIONS[name])}), flush=True)
    for line in sys.stdin if options.get("turns") else ():  # "decode" or "prefill", whenever it is this engine's turn
        seconds = options["seconds"]
        turn = decode(engine, ids, options["tokens"], seconds) if line.strip() == "decode" else [read(engine, ids)]
        print(json.dumps(turn), flush=True)
    os._exit(0)  # tearing gigabytes down is nobody's interest


if __name__ == "__main__":
    sys.exit(main())
