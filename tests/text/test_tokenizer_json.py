"""tokenizer.json and the Jinja template give the ids of the vocabulary and the renderer, in unmodified transformers."""
import json
import re
import shutil
from pathlib import Path

import pytest
from conversation_fixtures import bot, system, user
from golden import SHARED, needs_shared
from vocab_fixtures import train_sentencepiece

from research.telechat.common.errors import VocabError
from research.telechat.text.jinja import chat_template
from research.telechat.text.renderer import Renderer
from research.telechat.text.templates import TEMPLATES, get_template
from research.telechat.text.tokenizer_json import differences, probe_texts, tokenizer_json
from research.telechat.text.vocab import Vocab

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "conversations.jsonl"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "查天气", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]


def call(arguments):
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


CONVERSATIONS = [
    ([system("你是助手。"), user("hi"), bot("hello"), user(" 继续\n"), bot("好的")], None),
    ([user(""), bot("  two blanks"), user("a"), bot("")], None),
    ([user("1+1=?"), {**bot("2"), "reasoning_content": "一加一。\n得二。"}, user("2+2=?"),
      {**bot("4"), "reasoning_content": "二加二得四。"}], None),
    ([user("1+1=?"), bot("\n<think>\n一加一。\n</think>\n\n2"), user("2+2=?"), bot("二加二\n</think>\n\n4")], None),
    ([user("北京天气"),
      {"role": "assistant", "content": "", "tool_calls": [call('{"city": "北京"}'), call({"city": "上海"})]},
      {"role": "tool", "content": "晴"}, {"role": "tool", "content": "雨"}, bot("北京晴，上海雨。")], TOOLS),
    ([system("你是助手。\n"), user("天气"), {"role": "assistant", "content": "查一下", "tool_calls": [call({})]},
      {"role": "tool", "content": "晴"}, bot("晴。")], TOOLS),
    ([user("天气"), bot("好"), user("天气"),
      {"role": "assistant", "content": "看看", "reasoning_content": "先查。",
       "tool_calls": [call({"city": "北京", "n": 2})]},
      {"role": "tool", "content": "晴"}, {**bot("晴。"), "reasoning_content": "知道了。"}], TOOLS),
]


def example_conversations():
    """The conversations of the repository and those above: (messages, tools)."""
    for line in EXAMPLES.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        parts = re.split("<_user>|<_bot>", record["input"])[1:]
        yield [(bot if index % 2 else user)(part) for index, part in enumerate([*parts, record["output"]])], None
    yield from CONVERSATIONS


def assert_same_conversations(tokenizer, renderer):
    """apply_chat_template gives the renderer's ids: every prompt, and every whole conversation."""
    compared = 0
    for messages, tools in example_conversations():
        if tools and renderer.template.tools_block is None:
            continue
        if renderer.template.call_form != "json":            # there, a Jinja template needs arguments as objects
            messages = [{**message, "tool_calls": [call(json.loads(each["function"]["arguments"]) if isinstance(
                each["function"]["arguments"], str) else each["function"]["arguments"]) for each in message[
                    "tool_calls"]]} if "tool_calls" in message else message for message in messages]
        for place, message in enumerate(messages):
            if message["role"] in ("bot", "assistant"):
                prompt = tokenizer.apply_chat_template(messages[:place], tools=tools, add_generation_prompt=True,
                                                       return_dict=False)
                assert prompt == renderer.prompt(messages[:place], tools), messages[:place]
                whole = tokenizer.apply_chat_template(messages[:place + 1], tools=tools, return_dict=False)
                assert whole == renderer.render(messages[:place + 1], tools)[0], messages[:place + 1]
                compared += 2
    assert compared > 200


def example_texts():
    """Every text of the example conversations."""
    return [message["content"] for messages, _ in example_conversations() for message in messages if message["content"]]


def loaded(vocab, template):
    """(transformers' tokenizer, renderer) of a vocabulary."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    renderer = Renderer(get_template(template), vocab)
    content = tokenizer_json(vocab)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)), chat_template=chat_template(renderer),
        clean_up_tokenization_spaces=False)
    return content, tokenizer, renderer


@pytest.mark.parametrize("family, template", [
    ("7b", "telechat"), ("12b", "telechat"), ("12b", "telechat_system"), ("52b", "telechat_52b"),
    *(("telechat2", name) for name in TEMPLATES if name.startswith(("telechat2", "telechat3")))])
def test_small_vocabularies_and_templates(vocabs, family, template):
    vocab = vocabs[family]
    content, tokenizer, renderer = loaded(vocab, template)
    texts = [*probe_texts(vocab), *example_texts()]
    assert len(texts) > 800 and differences(content, vocab, texts) == []
    for text in texts[:200]:
        assert tokenizer(text, add_special_tokens=False).input_ids == vocab.encode_with_specials(text)
    assert_same_conversations(tokenizer, renderer)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name, template", [("telechat-52b", "telechat_52b"),
                                            ("telechat2-7b", "telechat2"), ("telechat3-36b", "telechat3_coder")])
def test_official_vocabularies_and_templates(tmp_path, name, template):
    """TeleChat2-7B with its names of the markers of tools."""
    data = SHARED / "data" / name
    if not (data / "tokenizer.model").exists():
        (tmp_path / "tokenizer.model").symlink_to(SHARED / "data/telechat2-115b/tokenizer.model")
        shutil.copyfile(data / "tokenizer_config.partial.json", tmp_path / "tokenizer_config.json")
        data = tmp_path
    vocab = Vocab.load(data)
    content, tokenizer, renderer = loaded(vocab, template)
    assert differences(content, vocab, [*probe_texts(vocab), *example_texts()]) == []
    assert_same_conversations(tokenizer, renderer)
    assert {tokenizer.convert_ids_to_tokens(i) for i in vocab.markers.values()} <= set(vocab.markers)
    assert template != "telechat2" or tokenizer.convert_tokens_to_ids("<tool_call>") == 9


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}},
    {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
                                           "split": False}},
    {"pre_tokenizer": None, "added_tokens": []},
])
def test_another_tokenizer_is_found_out(vocabs, change):
    """The usual ways to write one: no dummy prefix, Metaspace, markers that are text."""
    content = {**tokenizer_json(vocabs["12b"]), **change}
    assert differences(content, vocabs["12b"], probe_texts(vocabs["12b"]))


def test_merges_in_another_order_are_found_out(vocabs):
    content = tokenizer_json(vocabs["12b"])
    content["model"]["merges"].reverse()
    assert differences(content, vocabs["12b"], probe_texts(vocabs["12b"]))


def test_a_unigram_model_as_the_quick_start_trains_it(tmp_path):
    vocab = Vocab.load(train_sentencepiece(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=380))
    content, _, _ = loaded(vocab, "telechat")
    assert differences(content, vocab, [*probe_texts(vocab), *example_texts()]) == []


def test_text_behind_each_marker_has_the_dummy_prefix(vocabs):
    _, tokenizer, _ = loaded(vocabs["12b"], "telechat")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<_user>user<_bot> bot", add_special_tokens=False).input_ids)
    assert tokens[0] == "<_user>" and tokens[1].startswith("\u2581") and "".join(tokens).count("\u2581\u2581") == 1
    assert tokenizer.decode(tokenizer("<_user>user<_bot> bot", add_special_tokens=False).input_ids)


@pytest.mark.parametrize("options, fault", [
    ({"model_type": "char", "vocab_size": 380, "hard_vocab_limit": False}, "it is neither a BPE nor a unigram model"),
    ({"normalization_rule_name": "nmt_nfkc"}, "it normalises characters"),
    ({"remove_extra_whitespaces": True}, "it removes blanks"),
])
def test_what_tokenizer_json_has_no_words_for(tmp_path, options, fault):
    vocab = Vocab.load(train_sentencepiece(tmp_path / "tokenizer.model", **options))
    with pytest.raises(VocabError, match=fault):
        tokenizer_json(vocab)


def test_a_template_refuses_what_it_does_not_support(vocabs):
    _, tokenizer, _ = loaded(vocabs["12b"], "telechat")
    with pytest.raises(Exception, match="does not support tools"):
        tokenizer.apply_chat_template([user("a")], tools=TOOLS)
    with pytest.raises(Exception, match="role tool is not supported by this template"):
        tokenizer.apply_chat_template([user("a"), bot("b"), {"role": "tool", "content": "c"}])
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert tokenizer.apply_chat_template(parts, return_dict=False) == tokenizer.apply_chat_template(
        [user("ab")], return_dict=False)
