"""llama.cpp, by the server that the package xllamacpp holds."""

import json
import os
import urllib.request
from importlib.metadata import version

import xllamacpp

from qvtune.convert.readers.process import Answer, Request


def read(request: Request) -> Answer:
    """``arguments``: ``file``, ``dtype`` of its matrices."""
    longest = max(map(len, request.prompts)) + request.max_new_tokens
    params = xllamacpp.CommonParams()
    params.model.path = request.arguments["file"]
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = longest + 1, 1, False, False
    num_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))  # as the other readers
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    # Its cache is in F16 unless told otherwise, which changes the choice between tokens that are nearly as likely.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    url = f"{server.listening_address}/completion"
    tokens = [_continuation(url, ids, request.max_new_tokens) for ids in request.prompts]
    return Answer(tokens, request.arguments["dtype"], version("xllamacpp"))


def _continuation(url: str, ids: list[int], max_new_tokens: int) -> list[int]:
    query = {
        "prompt": ids,
        "n_predict": max_new_tokens,
        "temperature": 0,
        "top_k": 1,
        "return_tokens": True,
        "cache_prompt": False,
    }
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(query).encode(), headers)) as answer:
        found: list[int] = json.load(answer)["tokens"]
    return found
