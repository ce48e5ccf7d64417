"""vLLM's side of benchmarks/serve.py, run by the interpreter of an environment that has vLLM: FOLDER --slots N ...

Loads the Llama folder into vLLM's asynchronous engine and says "ready". Then each line of the input is a JSON object,
{"requests": [[prompt, new tokens, settings, seed], ...], "clients": N or 0 (all at once), "pause": seconds, "seed": N},
and its answer one line of JSON: for each request when it came and when its tokens did, and when the first one came.
Clients and pauses are those of serve.py. Needs nothing of this project.
"""
import argparse
import asyncio
import json
import os
import sys
import time
from typing import Any, Dict, List


def prepare() -> None:
    """Set the variables that vLLM reads when it is imported: offline, quiet, threads not bound to cores."""
    for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_LOGGING_LEVEL", "ERROR"), ("HF_HUB_OFFLINE", "1"),
                        ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
        os.environ.setdefault(name, value)


async def answer(engine: Any, number: str, request: List[Any]) -> Dict[str, Any]:
    """One request: when it came, when its tokens did."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    prompt, new, settings, seed = request
    params = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False, seed=seed,
                            output_kind=RequestOutputKind.DELTA, **settings)
    submitted, times = time.perf_counter(), []
    async for output in engine.generate({"prompt_token_ids": prompt}, params, number):
        times += [time.perf_counter()] * len(output.outputs[0].token_ids)
    assert len(times) == new, (len(times), new)
    return {"submitted": submitted, "tokens": times}


async def run(engine: Any, job: Dict[str, Any], round_: int) -> Dict[str, Any]:
    """All requests of a job."""
    import numpy as np
    started = time.perf_counter()
    requests = list(enumerate(job["requests"]))
    if not job["clients"]:
        return {"started": started, "results": list(await asyncio.gather(*(
            answer(engine, f"{round_}-{number}", request) for number, request in requests)))}
    rng, results = np.random.RandomState(job["seed"]), []

    async def client() -> None:
        while True:
            await asyncio.sleep(rng.exponential(job["pause"]))
            if not requests:
                return
            number, request = requests.pop(0)
            results.append(await answer(engine, f"{round_}-{number}", request))
    await asyncio.gather(*(client() for _ in range(job["clients"])))
    return {"started": started, "results": results}


async def serve(args: argparse.Namespace, answers: Any) -> None:
    """Answer the lines of the input."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=args.folder, skip_tokenizer_init=True, dtype="float32", max_model_len=args.context, block_size=32,
        max_num_seqs=args.slots, enforce_eager=args.eager, enable_prefix_caching=True))
    print("ready", file=answers, flush=True)
    loop = asyncio.get_running_loop()
    for round_ in range(1 << 30):
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            break
        print(json.dumps(await run(engine, json.loads(line), round_)), file=answers, flush=True)
    engine.shutdown()
    os._exit(0)                              # its destructors would complain about the end of Python


def main() -> None:
    """Entry point. What vLLM prints goes to stderr."""
    parser = argparse.ArgumentParser(description="vLLM's side of benchmarks/serve.py.")
    parser.add_argument("folder")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--eager", action="store_true", help="without torch.compile: starts sooner")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    asyncio.run(serve(args, answers))


if __name__ == "__main__":
    main()
