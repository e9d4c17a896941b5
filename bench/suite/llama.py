"""llama.cpp through the functions of its C interface."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    """llama.cpp tells a lot about itself."""


class Model:
    """A GGUF file, loaded, with one sequence.

    Raises:
        RuntimeError: llama.cpp does not take it.
    """

    def __init__(self, path: Path, threads: int, context: int) -> None:
        llama_cpp.llama_log_set(_quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def keep(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        memory = llama_cpp.llama_get_memory(self._context)
        if not llama_cpp.llama_memory_seq_rm(memory, 0, tokens, -1):
            raise RuntimeError(f"llama.cpp does not forget what follows token {tokens}")

    def feed(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits [V] after these tokens."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if failed := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {failed}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._size,)).copy()
