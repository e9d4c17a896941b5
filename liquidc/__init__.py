"""A compiler for decoder LLMs with dynamic depth and sparse experts.

`compile` turns a model into an engine directory, `load` runs one:

    import liquidc

    engine = liquidc.compile("samples/tiny-liquid", "engine", target="onnxruntime")
    for token in engine.generate("The with statement", max_new_tokens=32):
        print(token.text, token.depth, end=" ")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidc.version import __version__

if TYPE_CHECKING:
    import torch

    from liquidc.backends.base import RunnerOptions
    from liquidc.runtime import Engine

__all__ = ["__version__", "compile", "load"]


def compile(
    model: str | Path | torch.nn.Module,
    output: str | Path,
    *,
    target: str = "onnxruntime",
    **options: Any,
) -> Engine:
    """Compile a checkpoint directory or a module into the directory `output`, and load it.

    Args:
        model: what to compile.
        output: the engine directory to write.
        target: the backend; `liquidc targets` lists them.
        options: fields of `liquidc.pipeline.CompileOptions`.

    Raises:
        liquidc.errors.InputError: the model, the options or the output are wrong.
        liquidc.errors.TargetUnavailable: the target can't be built or run here.
    """
    from liquidc.pipeline import compile_model
    from liquidc.plan import CompileOptions
    from liquidc.values import path_of

    output = path_of(output, "the output")
    return load(compile_model(model, output, CompileOptions(target=target, **options)).engine)


def load(directory: str | Path, *, options: RunnerOptions | None = None) -> Engine:
    """Load an engine; see `liquidc.runtime.load`.

    Raises:
        liquidc.errors.EngineError: the engine is damaged, incomplete or too new.
        liquidc.errors.TargetUnavailable: its target can't run here.
    """
    from liquidc.runtime import load as load_engine

    return load_engine(directory, options=options)
