"""`TelechatTokenizerFast`: the tokenizer of TeleChat-7B, from its ``tokenizer.json``, for YAML and the text generator.

The same tokenizer as telechat_tokenizer's, with the defaults of 7B and a byte-level BPE vocabulary, which the Rust
library tokenizers encodes. It has no offset mapping, so that MindFormers takes it for a "slow" one.
"""
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from research.telechat.bridge.compat import MindFormerModuleType, plugin_class
from research.telechat.common.errors import VocabError
from research.telechat.common.files import JsonObject
from research.telechat.telechat_tokenizer import TelechatTokenizer
from research.telechat.text.vocab_files import JSON_FILE


@plugin_class(MindFormerModuleType.TOKENIZER)
class TelechatTokenizerFast(TelechatTokenizer):
    """Tokenizer of TeleChat-7B.

    Args:
        tokenizer_file: ``tokenizer.json``, or the folder that holds it; `vocab_file` is another name for it.
        unk_token, bos_token, eos_token, pad_token: pieces; the defaults are those of TeleChat-7B.
        kwargs: as for `TelechatTokenizer`, whose remarks on markers hold here.

    Raises VocabError for a file that cannot be read, or a token that is not a marker in it.
    """

    # Empty on purpose: with a name in it, MindFormers refuses a YAML that says tokenizer_file and not vocab_file.
    vocab_files_names: Dict[str, str] = {}               # noqa: RUF012 (MindFormers' own form)

    def __init__(self, tokenizer_file: Optional[str] = None, unk_token: object = "<unk>",
                 bos_token: object = "<_start>", eos_token: object = "<_end>", pad_token: object = "<pad>",
                 vocab_file: Optional[str] = None, **kwargs: Any):
        path = tokenizer_file or vocab_file
        if not path:
            raise VocabError(f"tokenizer_file is not set; name the model's {JSON_FILE}, in the recipe under "
                             "processor.tokenizer or with --processor.tokenizer.tokenizer_file")
        super().__init__(path, unk_token, bos_token, eos_token, pad_token, **kwargs)

    @classmethod
    def read_files_according_specific_by_tokenizer(cls, name_or_path: str) -> Tuple[Dict[str, str], JsonObject]:
        """Files of a folder given to `from_pretrained` (MindFormers' hook)."""
        files, configs = super().read_files_according_specific_by_tokenizer(name_or_path)
        path = Path(name_or_path) / JSON_FILE
        return ({**files, "tokenizer_file": str(path)} if path.is_file() else files), configs
