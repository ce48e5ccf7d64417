"""The features of a plan that determine its graph; each of them must have been executed somewhere."""
from typing import FrozenSet

from research.telechat.plan.plan import Plan


def features(plan: Plan) -> FrozenSet[str]:
    """Names of the features that a plan has."""
    model = plan.model
    over_heads = plan.ulysses if plan.cp > 1 else 1
    has = {
        "data parallelism": plan.dp > 1, "model parallelism": plan.mp > 1, "pipeline": plan.pp > 1,
        "sequence parallelism": plan.sequence_parallel, "heads exchanged": over_heads > 1,
        "keys gathered": plan.cp > over_heads and not model.use_ring_attention,
        "ring attention": plan.cp > over_heads and model.use_ring_attention,
        "optimizer sharded": plan.optimizer_sharded and plan.dp * plan.cp > 1, "remainders": plan.remainder,
        "adapters": plan.lora_rank > 0, "virtual stages": plan.virtual_stages > 1,
        "batches interleaved": plan.interleaved_batches > 1,
        "gradients accumulated": plan.micro_batches > plan.interleaved_batches and plan.pp == 1,
        "vocabulary whole": plan.mp > 1 and plan.vocab_pieces == 1, "documents": model.document_boundaries,
        "padding masked": model.mask_pad_tokens, "grouped heads": bool(model.n_kv_heads < model.num_heads),
        "fused projections": model.fused_projections, "tied embeddings": model.tie_word_embeddings,
        "separate embeddings": not model.tie_word_embeddings}
    return frozenset(name for name, present in has.items() if present)
