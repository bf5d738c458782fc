"""How much memory and time the surgery takes on a checkpoint of Gemma 3 4B's shape.

    python benchmarks/surgery.py [--layers 34] [--data FOLDER] [--work FOLDER]

Writes random weights in shards, without ever building the model (about 7.8 GB for 34 layers), learns 6,143 tokens from
Korean text for the real Gemma 3 tokenizer, grafts them into the unused slots, unties, and proves the rest unchanged:
the two commands `lingraft tokenizer graft` and `lingraft graft`, each in its own process. Prints their seconds and
peak memory (resident, mapped files included), and removes what it wrote. `--data` is the folder of real tokenizers
and texts (see CONTRIBUTING.md); `--work` a folder with room for twice the checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, WIDTH, HIDDEN, QUERIES, KEYS, HEAD = 262_208, 2560, 10_240, 2048, 1024, 256
SLOTS = 6143
GIB = 1 << 30

CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": HEAD,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}


def shards(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, a shard at a time: the embedding, then four layers each."""
    yield {"model.embed_tokens.weight": (ROWS, WIDTH), "model.norm.weight": (WIDTH,)}
    for first in range(0, layers, 4):
        yield {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(first, min(first + 4, layers))
            for name, shape in {
                "self_attn.q_proj": (QUERIES, WIDTH),
                "self_attn.k_proj": (KEYS, WIDTH),
                "self_attn.v_proj": (KEYS, WIDTH),
                "self_attn.o_proj": (WIDTH, QUERIES),
                "self_attn.q_norm": (HEAD,),
                "self_attn.k_norm": (HEAD,),
                "mlp.gate_proj": (HIDDEN, WIDTH),
                "mlp.up_proj": (HIDDEN, WIDTH),
                "mlp.down_proj": (WIDTH, HIDDEN),
                "input_layernorm": (WIDTH,),
                "post_attention_layernorm": (WIDTH,),
                "pre_feedforward_layernorm": (WIDTH,),
                "post_feedforward_layernorm": (WIDTH,),
            }.items()
        }


def write_checkpoint(folder: Path, layers: int, tokenizer: Path) -> None:
    """Random weights with an index, the config, and the tokenizer."""
    folder.mkdir()
    names = list(shards(layers))
    weight_map = {}
    for number, shard in enumerate(names, 1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    packed = (tokenizer / "tokenizer.json.gz").read_bytes()
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed))
    (folder / "tokenizer.model").write_bytes((tokenizer / "tokenizer.model").read_bytes())


def lingraft(*arguments: object) -> tuple[dict[str, object], float, float]:
    """Run a verb in its own process: its JSON, its seconds, its peak of resident memory in GiB."""
    start = time.monotonic()
    command = [sys.executable, "-m", "lingraft.cli", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(output), time.monotonic() - start, usage.ru_maxrss * 1024 / GIB  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=34)
    default = os.environ.get("LINGRAFT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--work", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        start = time.monotonic()
        write_checkpoint(work / "base", arguments.layers, arguments.data / "tokenizers" / "gemma3_262k")
        size = sum(file.stat().st_size for file in (work / "base").glob("*.safetensors"))
        print(
            f"checkpoint  {arguments.layers} layers, {size / 1e9:.1f} GB, written in {time.monotonic() - start:.0f} s"
        )
        text = arguments.data / "ko-medical" / "health_law.jsonl.gz"
        learnt, seconds, peak = lingraft(
            *("tokenizer", "graft", "--base", work / "base", "--text", text, "--new-tokens", SLOTS),
            *("--slots", "unused", "--out", work / "tokenizer"),
        )
        print(f"tokenizer   {learnt['reused_slots']:,} slots, {seconds:.0f} s, peak {peak:.2f} GiB")
        grafted, seconds, peak = lingraft(
            *("graft", "--base", work / "base", "--tokenizer", work / "tokenizer", "--out", work / "out"),
        )
        parts = grafted["seconds"]
        assert isinstance(parts, dict)
        print(f"surgery     {seconds:.0f} s, peak {peak:.2f} GiB")
        print("  of these  " + ", ".join(f"{part} {value:.1f} s" for part, value in parts.items()))


if __name__ == "__main__":
    main()
