"""What a model holds in memory after reading so many tokens, measured in a process of its own.

    python -m wkv.eval_memory '{"pretrained": "FOLDER", "dtype": "float32", "device": "cpu", "lengths": [512, 1024]}'

prints, by length, the bytes of the state (or of the key and value cache) and of the whole process. It leaves out the
lengths that the model was not made for and those that would take it too long.
"""

import json
import sys
import time

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .auto import GENERATIONS

# Reading goes on while the next length is expected to take less than this.
SECONDS = 30
CHUNK = 512


def cache_bytes(cache) -> int:
    """The size of all tensors in a cache of transformers or of ours."""
    waiting, size = list(cache.layers), 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            size += value.nbytes
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif hasattr(value, "__dict__") and type(value).__module__.startswith(("wkv.", "transformers.cache_utils")):
            waiting += vars(value).values()
    return size


def process_bytes(device: str) -> int:
    """Memory of the process now: resident, or on a CUDA device allocated."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss


@torch.inference_mode()
def memory_by_context(model, lengths: list[int]) -> dict[str, dict[str, int]]:
    """{tokens: {"cache_bytes": of the state or the key and value cache, "process_bytes": of everything}}."""
    config = model.config
    if config.model_type not in GENERATIONS:
        lengths = [n for n in lengths if n <= getattr(config, "max_position_embeddings", n)]
    generator = torch.Generator().manual_seed(0)
    # The first call sets things up, which takes its time.
    model(torch.ones(1, 1, dtype=torch.long, device=model.device))
    cache, read, start, found = None, 0, time.perf_counter(), {}
    for length in sorted(lengths):
        elapsed = time.perf_counter() - start
        if read and elapsed * length / read > SECONDS:
            break
        while read < length:
            size = 1, min(CHUNK, length - read)
            ids = torch.randint(1, config.vocab_size, size, generator=generator)  # (1, T)
            cache = model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            read += size[1]
        found[str(length)] = {"cache_bytes": cache_bytes(cache), "process_bytes": process_bytes(model.device)}
    return found


def main() -> None:
    request = json.loads(sys.argv[1])
    logging.disable_progress_bar()
    if request.get("threads"):
        torch.set_num_threads(request["threads"])
    source = {"gguf_file": request["gguf_file"]} if request.get("gguf_file") else {}
    model = AutoModelForCausalLM.from_pretrained(request["pretrained"], dtype=request["dtype"], **source)
    if request.get("peft"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["peft"])
    print(json.dumps(memory_by_context(model.to(request["device"]).eval(), request["lengths"])))


if __name__ == "__main__":
    main()
