"""A program, not a module: transformers' continuous batching on the same requests, run by a Python with torch and it.

It reads JSON: ``config`` (of a Llama), ``dtype``, ``threads``, ``requests`` (prompt token ids, tokens to
make). The weights are random: no token depends on them, since every request makes all of its tokens. Prints seconds.
"""

import json
import sys
import time

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig


def main() -> None:
    """Run all requests once, after a warm-up with a few."""
    task = json.load(sys.stdin)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(task["threads"])
    config = transformers.LlamaConfig(**task["config"])
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, task["dtype"])).eval()
    model.set_attn_implementation("sdpa")
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = sum(-(-(len(prompt) + tokens) // 32) for prompt, tokens in task["requests"])
    room = ContinuousBatchingConfig(page_size=32, num_blocks=pages, max_batch_tokens=512, allow_block_sharing=False)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=room) as manager:

        def run(requests: list[tuple[list[int], int]]) -> float:
            start = time.perf_counter()
            wanted = {manager.add_request(prompt, max_new_tokens=tokens): tokens for prompt, tokens in requests}
            while wanted:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' manager has ended")
                if result is not None and result.is_finished():
                    tokens = wanted.pop(result.request_id)
                    if len(result.generated_tokens) != tokens:
                        raise RuntimeError(f"{len(result.generated_tokens)} tokens instead of {tokens}: {result.error}")
            return time.perf_counter() - start

        run([(prompt, 4) for prompt, _ in task["requests"][:8]])
        seconds = run(task["requests"])
    print(json.dumps({"seconds": seconds}))


main()
