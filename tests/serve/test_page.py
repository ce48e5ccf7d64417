"""The chat page: what it may do, and how it works in a browser."""
import re

import pytest
from browser import Browser
from serve_fixtures import Served

from research.telechat.serve.host import Times, Web, listen
from research.telechat.serve.page import PAGE, read_page

TEXT = PAGE.read_text(encoding="utf-8")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'


def test_text_can_never_become_markup():
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert word not in TEXT


def test_nothing_comes_from_anywhere_else():
    assert not re.search(r"(?:src|href)=\"(?!data:,)", TEXT) and not re.search(r"https?://|@import|url\(", TEXT)
    assert " style=" not in TEXT and not re.search(r"\son\w+=", TEXT)          # the policy forbids both
    _, policy = read_page()
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2


def test_both_languages_have_all_words():
    english, chinese = (set(re.findall(r"(?:^|[\s{])(\w+): [\"(n]", block)) for block in
                        re.findall(r"^  (?:en|zh): \{(.*?)^  \},", TEXT, re.DOTALL | re.MULTILINE))
    assert english == chinese and len(english) > 25
    assert set(re.findall(r'data-word="(\w+)"|word\("(\w+)"\)', TEXT)) and all(
        (one or other) in english for one, other in re.findall(r'data-word="(\w+)"|word\("(\w+)"\)', TEXT))


@pytest.fixture(scope="module")
def served(vocabs):
    with Served(vocabs["telechat2"], context=1500, pause=0.003) as served:
        listener = listen("127.0.0.1", 0)
        web = Web(served.app, listener, Times(grace=1))
        web.start()
        served.url = f"http://localhost:{listener.getsockname()[1]}/"
        yield served
        web.stop()


@pytest.fixture(scope="module")
def browser(served):
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(browser, served):
    browser.open(served.url)
    browser.run("state.messages = []; state.fields = {}; state.language = 'en'; state.theme = 'light'; keep()")
    browser.reload()
    browser.wait("model !== ''")
    browser.errors.clear()
    yield browser
    assert not browser.errors


TEXTS = ("[...document.querySelectorAll('#log > div')].map(box => "
         "[box.className, (box.querySelector('.text') || {}).textContent])")


def ask(page, question):
    page.run("document.getElementById('question').focus()")
    page.type(question)
    page.press("Enter")


def settled(page, messages):
    page.wait(f"running === null && document.querySelectorAll('#log > div').length === {messages}")
    return page.run(TEXTS)


@pytest.mark.slow
def test_ask_reload_and_go_on(page, served):
    served.answer = "<script>alert(1)</script> 生抽颜色浅。"
    ask(page, "生抽与老抽的区别？")
    expected = [["user", "生抽与老抽的区别？"], ["assistant", served.answer]]
    assert settled(page, 2) == expected
    assert page.run("document.getElementById('model').textContent") == "telechat-test"
    page.reload()
    page.wait("document.querySelectorAll('#log > div').length === 2")
    assert page.run(TEXTS) == expected
    ask(page, "为什么？")
    assert len(settled(page, 4)) == 4
    history = [{"role": "user", "content": "生抽与老抽的区别？"}, {"role": "assistant", "content": served.answer},
               {"role": "user", "content": "为什么？"}]
    assert list(served.scheduler.requests[-1].prompt) == served.renderer.prompt(history)


@pytest.mark.slow
def test_stop_retry_and_edit(page, served):
    served.answer = "好" * 900
    ask(page, "数一数")
    page.wait("(document.querySelector('.assistant .text') || {textContent: ''}).textContent.length > 3")
    page.run("document.getElementById('send').click()")
    stopped = settled(page, 2)[1][1]
    assert 3 < len(stopped) < 900 and "Stopped." in page.run("document.body.innerText")
    served.answer = "重来"
    page.run("[...document.querySelectorAll('.assistant button')][0].click()")
    assert settled(page, 2)[1] == ["assistant", "重来"]
    page.run("document.querySelector('.user button').click()")
    assert page.run("document.getElementById('question').value") == "数一数" and settled(page, 0) == []


@pytest.mark.slow
def test_enter_that_ends_a_chinese_word_sends_nothing(page):
    page.run("document.getElementById('question').focus()")
    page.type("nihao")
    page.run("document.getElementById('question').dispatchEvent(new KeyboardEvent('keydown', "
             "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true})); 1")
    assert page.run("state.messages.length") == 0 and page.run("document.getElementById('question').value") == "nihao"


@pytest.mark.slow
def test_settings_reasoning_and_tools(page, served):
    page.run("""(() => { const set = (id, value) => { const box = document.getElementById(id); box.value = value;
        box.dispatchEvent(new Event('change')); }; set('system', '你是助手'); set('temperature', '0'); set('seed', '7');
        set('max_tokens', '99'); set('tools', '[{"type": "function", "function": {"name": "weather"}}]'); })()""")
    served.answer = f"<think>先查天气</think>我来查询。{CALL}"
    ask(page, "北京天气")
    assert settled(page, 2)[1] == ["assistant", "我来查询。"]
    folded = page.run("[...document.querySelectorAll('details')].map(one => [one.open, one.innerText ? "
                      "one.querySelector('summary').textContent : '', one.querySelector('pre').textContent])")
    assert folded == [[False, "Reasoning", "先查天气"], [False, "Calls tool weather", '{"city": "北京"}']]
    request = served.scheduler.requests[-1]
    assert (request.seed, request.max_new_tokens, request.sampling.do_sample) == (7, 99, False)
    assert "你是助手" in served.vocab.decode(request.prompt)
    served.answer = "晴天"
    assert page.run("document.getElementById('question').placeholder") == "Tool result"
    ask(page, "晴")
    assert settled(page, 4)[2:] == [["tool", "晴"], ["assistant", "晴天"]]
    assert "<tool_response>\n晴\n</tool_response>" in served.vocab.decode(served.scheduler.requests[-1].prompt)


@pytest.mark.slow
def test_a_long_conversation_loses_its_beginning_and_says_so(page, served):
    served.answer = "好"
    page.run("state.messages = Array.from({length: 12}, (_, at) => ({role: at % 2 ? 'assistant' : 'user', "
             "content: '很长'.repeat(120), end: 'stop'})); keep(); show(); 1")
    ask(page, "还记得吗")
    settled(page, 14)
    assert "oldest turns did not fit" in page.run("document.body.innerText")


@pytest.mark.slow
def test_languages_themes_and_phones(page):
    page.run("document.getElementById('language').click(); document.getElementById('theme').click()")
    assert page.run("document.getElementById('send').textContent") == "发送"
    assert page.run("document.documentElement.dataset.theme") == "dark"
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    page._ask("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    try:
        assert page.run("document.documentElement.scrollWidth <= 360 && "
                        "document.getElementById('send').getBoundingClientRect().right <= 360")
    finally:
        page._ask("Emulation.setDeviceMetricsOverride", width=1000, height=760, deviceScaleFactor=1, mobile=False)


@pytest.mark.slow
def test_an_error_is_shown(page, served):
    ask(page, "好" * 3000)
    settled(page, 2)
    assert "1500 tokens" in page.run("document.querySelector('.error').textContent")
