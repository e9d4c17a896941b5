"""llama.cpp in a process of its own, timed there."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import llama_cpp


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    """llama.cpp tells a lot about itself."""


def serve(pipe: Connection, path: str, context: int, threads: int) -> None:
    """Answer (tokens, cached, warm_up, steps) with the seconds of each step, until None comes."""
    llama_cpp.llama_log_set(_quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = context
    params.n_threads = params.n_threads_batch = threads
    made = llama_cpp.llama_init_from_model(model, params)

    def run(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        failed = llama_cpp.llama_decode(made, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")

    while (asked := pipe.recv()) is not None:
        tokens, cached, warm_up, steps = asked
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(made), True)
        run(tokens[:cached])
        timed: list[float] = []
        for step in range(warm_up + steps):
            start = time.perf_counter()
            run([tokens[step % len(tokens)]])
            llama_cpp.llama_get_logits_ith(made, -1)
            timed.append(time.perf_counter() - start)
        pipe.send(timed[warm_up:])
