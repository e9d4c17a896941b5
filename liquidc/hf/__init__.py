"""`transformers` for Liquid checkpoints: importing this registers `model_type` "liquid".

    import liquidc.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("samples/tiny-liquid")

Nothing else in liquidc imports transformers; it comes with `pip install 'liquidc[hf]'`.
"""

from __future__ import annotations

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError:
    raise ImportError("liquidc.hf needs transformers: pip install 'liquidc[hf]'") from None

from liquidc.hf.cache import LiquidHfCache
from liquidc.hf.config import LiquidHfConfig
from liquidc.hf.model import LiquidForCausalLM, LiquidHfOutput

AutoConfig.register("liquid", LiquidHfConfig, exist_ok=True)
AutoModelForCausalLM.register(LiquidHfConfig, LiquidForCausalLM, exist_ok=True)

__all__ = ["LiquidForCausalLM", "LiquidHfCache", "LiquidHfConfig", "LiquidHfOutput"]
