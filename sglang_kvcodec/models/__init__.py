"""Language models on this machine, run outside a server: for calibration and for measuring what a codec costs."""

from sglang_kvcodec.models.causal_lm import KV, CausalLM, use_threads

__all__ = ["KV", "CausalLM", "use_threads"]
