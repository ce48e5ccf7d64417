"""Vocabulary files that are broken, of another kind or changed; vocabularies in other processes."""
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from vocab_fixtures import train_sentencepiece

from research.telechat.common.errors import ConfigError, VocabError
from research.telechat.common.protobuf import fields
from research.telechat.text.vocab import Vocab

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["tokenizer.model", "control.model", "tokenizer.json"])
def vocab(request, vocab_folder):
    return Vocab.load(vocab_folder / request.param)


class TestErrors:
    def test_no_such_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"not found: .*nowhere\.model"):
            Vocab.load(tmp_path / "nowhere.model")
        with pytest.raises(VocabError, match="holds neither"):
            Vocab.load(tmp_path)

    @pytest.mark.parametrize(("content", "message"), [
        (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<html>404</html>", "neither a SentencePiece model"), (b"\x00" * 100, "neither a SentencePiece model"),
        (b"\xff" * 100, "neither a SentencePiece model"), (b'{"model_type": "telechat"}', "not a tokenizer.json"),
        (b'{"version": "1.0", "added', "not valid JSON"), (b"{\xff}", "not valid JSON")])
    def test_not_a_vocabulary(self, tmp_path, content, message):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(content)
        with pytest.raises(VocabError, match=message) as caught:
            Vocab.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_truncated_anywhere(self, vocab_folder, tmp_path):
        data = (vocab_folder / "tokenizer.model").read_bytes()
        path = tmp_path / "tokenizer.model"
        field_ends = [end for _, _, _, end in fields(data, 0, len(data))]  # where the rest is a message of its own
        for length in [*range(1, 200), *range(200, len(data) - 60, 97), *field_ends[300:320], *field_ends[-4:-1]]:
            path.write_bytes(data[:length])
            with pytest.raises(VocabError):
                Vocab.load(path)

    def test_named_token_must_be_a_marker(self, vocab_folder):
        with pytest.raises(VocabError, match=r"the user token '<_usr>' is not in it; its markers are .*<_user>"):
            Vocab.load(vocab_folder / "tokenizer.model", {"user": "<_usr>"})
        for ordinary in ("1", "_"):
            with pytest.raises(VocabError, match="ordinary piece"):
                Vocab.load(vocab_folder / "tokenizer.model", {"user": ordinary})

    def test_text(self, vocab):
        with pytest.raises(VocabError, match=r"lone surrogate.*at character 3"):
            vocab.encode("ab\ud83d")
        with pytest.raises(VocabError, match=r"text 2 of 3 .* lone surrogate"):
            vocab.encode_batch(["a", "\udc00", "b"])
        with pytest.raises(VocabError, match=r"text 2 of 3 .* lone surrogate"):
            vocab.encode_arrays(["a", "\udc00", "b"])
        with pytest.raises(VocabError, match="is NoneType, expected str"):
            vocab.encode(None)
        with pytest.raises(VocabError, match=r"text 2 of 2 .*bytes, expected str"):
            vocab.encode_batch(["a", b"a"])

    def test_ids(self, vocab):
        assert vocab.decode([vocab.size, vocab.size + 100]) == "\ufffd\ufffd"
        assert vocab.token_to_id("<_no_such_piece>") is None
        assert vocab.token_to_id(vocab.id_to_token(0)) == 0
        for bad in (-1, vocab.size):
            with pytest.raises(VocabError, match=f"id {bad} does not exist"):
                vocab.id_to_token(bad)
        with pytest.raises(VocabError, match="negative"):
            vocab.decode([-100])


class TestProcesses:
    def test_pickle(self, vocab):
        named = Vocab.load(vocab.path, {"user": "<_user>"})
        again = pickle.loads(pickle.dumps(named))
        assert again.fingerprint == named.fingerprint
        assert again.special_ids == named.special_ids
        assert again.encode("生抽<_user>") == named.encode("生抽<_user>")

    def test_changed_file_is_noticed(self, tmp_path):
        path = train_sentencepiece(tmp_path / "t.model")
        pickled = pickle.dumps(Vocab.load(path))
        train_sentencepiece(path, vocab_size=590)
        with pytest.raises(VocabError, match="has changed"):
            pickle.loads(pickled)

    def test_needs_no_framework(self, vocab_folder):
        code = ("import sys; from research.telechat.text.vocab import Vocab; "
                f"print(Vocab.load({str(vocab_folder)!r}).encode('<_bot>a')); "
                "print(sorted({'mindspore', 'mindformers', 'transformers', 'torch'} & set(sys.modules)))")
        lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                               timeout=120).stdout.splitlines()
        assert lines == [str(Vocab.load(vocab_folder).encode("<_bot>a")), "[]"]

    def test_fingerprint_is_the_file(self, vocab_folder, vocab):
        import hashlib
        assert vocab.fingerprint == hashlib.sha256(vocab.path.read_bytes()).hexdigest()


def test_small_vocabulary_without_byte_fallback(tmp_path):
    """Characters it lacks become the unknown token, which is no forged marker."""
    path = train_sentencepiece(tmp_path / "tokenizer.model", byte_fallback=False, vocab_size=400)
    vocab = Vocab.load(path)
    assert vocab.token_to_id("<_unk>") in vocab.encode("€")
    assert vocab.token_to_id("<_bot>") not in vocab.encode("<_bot>")
