"""Models that reason before they answer: the reasoning is cut, has its own limit, and comes before a begun answer."""
from types import SimpleNamespace as Space

import numpy as np
import pytest
from evaluation_fixtures import needs_harness
from vocab_fixtures import train_sentencepiece

from research.telechat.common.errors import ConfigError
from research.telechat.evaluation.needs import check_reasoning
from research.telechat.generation.batch import Reading
from research.telechat.generation.blocks import BlockPool
from research.telechat.generation.scheduler import Scheduler
from research.telechat.text.renderer import Renderer, get_template

ASKED = [{"role": "user", "content": "1+1?"}]
THOUGHT = "one and one"


class Step:
    """The tokens that come next."""

    def __init__(self, tokens, size):
        self._tokens, self._size = tokens, size

    def tokens(self):
        return self._tokens

    def logits(self):
        return np.eye(self._size, dtype=np.float32)[self._tokens]


class Script:
    """An engine that goes on with what was written for a text, and else ends."""

    together, border, pieces, context = False, None, False, 400

    def __init__(self, size, end, texts):
        self.vocab_size, self._end, self._texts = size, end, texts
        self.pool = BlockPool(64, 16)

    def _next(self, rows):
        found = []
        for row in rows:
            ids = list(map(int, row.tokens[:row.length]))
            longer = [text for text in self._texts if text[:len(ids)] == ids and len(text) > len(ids)]
            found.append(longer[0][len(ids)] if longer else self._end)
        return Step(found, self.vocab_size)

    def scaling(self, length):
        return 0

    def stale(self, length):
        pass

    def read(self, rows):
        return [Reading(list(rows), self._next(rows))]

    def advance(self, rows, batch):
        return self._next(rows)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(TelechatLM of a model that says what was written for it, its renderer, the function that writes)."""
    pytest.importorskip("lm_eval")
    from research.telechat.evaluation.harness import TelechatLM
    from research.telechat.telechat_tokenizer import TelechatTokenizer
    tokenizer = TelechatTokenizer(str(train_sentencepiece(tmp_path_factory.mktemp("vocab") / "tokenizer.model")))
    vocab, texts = tokenizer.vocab, []
    renderer = Renderer(get_template("telechat2_think"), vocab)
    engine = Script(len(vocab), renderer.end_id, texts)
    plan = Space(data_parallel=1, context_parallel=1, pipeline_stage=1)
    config = Space(parallel_config=plan, seq_length=400, chat_template="telechat2_think", eos_token_id=2)
    model = Space(config=config, scheduler=lambda settings=None: Space(engine=engine) if settings is None else
                  Scheduler(engine, settings))
    lm = TelechatLM(model, tokenizer, 4, progress=False, thinking_tokens=40)

    def write(*parts):
        """A text that begins with the prompt; what the model says continues its last line."""
        line = len(vocab.encode("\n"))
        texts.append([*renderer.prompt(ASKED), *vocab.encode_with_specials("\n" + parts[0])[line:],
                      *(token for part in parts[1:] for token in vocab.encode(part))])
    return lm, renderer, write, texts


def ask(lm, text, **settings):
    return lm.generate_until([Space(args=(text, {"until": [], **settings}))])[0]


@needs_harness
class TestReasoning:
    def test_is_cut_and_has_a_limit_of_its_own(self, setting):
        """The answer has all its tokens, however long the reasoning was, which a stop text does not end."""
        lm, _, write, texts = setting
        texts.clear()
        write(f"{THOUGHT}\n</think>\n\nfox jumps over the lazy dog")
        prompt = lm.apply_chat_template(ASKED)
        whole = ask(lm, prompt, max_gen_toks=30)
        assert whole == "fox jumps over the lazy dog"
        assert whole.startswith(ask(lm, prompt, max_gen_toks=3)) and ask(lm, prompt, max_gen_toks=3) not in ("", whole)
        assert ask(lm, prompt, max_gen_toks=30, until=["one", "over"]) == "fox jumps "
        assert lm.counts == {}

    def test_without_an_end(self, setting):
        lm, _, write, texts = setting
        texts.clear()
        write("the lazy dog " * 30)
        assert ask(lm, lm.apply_chat_template(ASKED), max_gen_toks=30) == ""
        assert lm.counts["answers did not finish their reasoning within the limit"] == 1
        lm.counts.clear()

    def test_before_an_answer_that_the_task_begins(self, setting):
        """HumanEval's and MBPP's instruct forms: the model reasons, then goes on with what the task has begun."""
        lm, renderer, write, texts = setting
        texts.clear()
        write(f"{THOUGHT}{renderer.template.think_end}", "the end", " of the world")
        write(f"{THOUGHT}\n</think>\n\nanother answer")
        begun = lm.apply_chat_template([*ASKED, {"role": "assistant", "content": "the end"}], False)
        assert ask(lm, begun, max_gen_toks=30).strip() == "of the world"

    def test_turn_that_ends_within_its_reasoning(self, setting):
        """The end marker does not come into the prompt that goes on with the answer."""
        lm, renderer, write, texts = setting
        texts.clear()
        write(f"{THOUGHT}{renderer.template.think_end}", "the end", " of the world")
        write(THOUGHT)
        texts.insert(0, [*texts.pop(), renderer.end_id])   # the model ends its turn there
        begun = lm.apply_chat_template([*ASKED, {"role": "assistant", "content": "the end"}], False)
        assert ask(lm, begun, max_gen_toks=30).strip() == "of the world"
        lm.counts.clear()

    def test_no_log_likelihoods_behind_it(self, setting):
        lm = setting[0]
        with pytest.raises(ConfigError, match="reasoning, after which no log-likelihood can be scored"):
            lm.loglikelihood([Space(args=(lm.apply_chat_template(ASKED), " A"))])
        loaded = {"tasks": {"mmlu_anatomy": Space(OUTPUT_TYPE="multiple_choice"), "gsm8k": Space(
            OUTPUT_TYPE="generate_until")}}
        with pytest.raises(ConfigError, match="--tasks: mmlu_anatomy scores log-likelihoods"):
            check_reasoning(loaded)
        check_reasoning({"tasks": {"gsm8k": loaded["tasks"]["gsm8k"]}})
