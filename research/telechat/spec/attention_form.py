"""In which form packed documents reach the flash attention kernel. The model and the planner ask here."""
from typing import Protocol


class AttentionSettings(Protocol):
    """What is asked of the settings of a model."""

    @property
    def document_boundaries(self) -> bool: ...

    @property
    def use_flash_attention(self) -> bool: ...

    @property
    def mask_pad_tokens(self) -> bool: ...

    @property
    def attention_dropout_prob(self) -> float: ...

    @property
    def use_past(self) -> bool: ...


def documents_back_to_back(settings: AttentionSettings, gathering: int) -> bool:
    """Whether the kernel gets the tokens of all sequences back to back and the ends of their documents, without a mask
    of every pair of tokens.

    Not with a dropout of probabilities or a mask of padding, which the kernel takes per sequence only; and not where
    context parallelism shards queries. settings: keys of model_config; gathering: ranks that queries are sharded over.
    """
    return bool(settings.document_boundaries and settings.use_flash_attention and gathering == 1
                and not settings.mask_pad_tokens and not settings.attention_dropout_prob and not settings.use_past)
