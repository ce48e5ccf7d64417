"""AlignBench and MT-bench: files as published, answers, a made-up judge on the loopback, interruptions."""
import json
from types import SimpleNamespace as Space

import numpy as np
import pytest
from evaluation_fixtures import RECIPE
from judged_fixtures import FakeJudge, write_judged_sets
from scheduler_fixtures import FakeEngine
from vocab_fixtures import train_sentencepiece

from research.telechat.commands import evaluate as command
from research.telechat.common.errors import ConfigError
from research.telechat.evaluation import judge as judging
from research.telechat.evaluation.asking import answer_all
from research.telechat.evaluation.judge import Judge, Store, digest, judge_all
from research.telechat.evaluation.judged import align_rating, align_score, mt_rating, outcome, read_bench
from research.telechat.generation.scheduler import Scheduler
from research.telechat.text.renderer import Renderer, get_template


class Canned:
    """Answers with the last question, and notes what it was asked."""

    batch_size = 1

    def __init__(self):
        self.asked = []

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return "/".join(message["content"] for message in messages)

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [f"[{request.args[0].rsplit('/')[-1]}]" for request in requests]


@pytest.fixture
def served():
    started = []

    def start(reply):
        started.append(FakeJudge(reply))
        return started[-1]
    yield start
    for each in reversed(started):
        each.close()


@pytest.fixture
def data(tmp_path):
    write_judged_sets(tmp_path)
    return tmp_path


def test_published_files(data):
    """Prompts are the user's own, filled; AlignBench's is read from its judge.py, which does not run."""
    align, mt = read_bench("alignbench", str(data)), read_bench("mt_bench", str(data))
    assert [(each.category, each.temperature) for each in align.questions] == [
        ("数学计算", 0.1), ("文本写作", 0.7), ("文本写作", 0.7)]
    assert align.questions[0].judge(["二"]) == [[{"role": "user", "content":
        "类型数学计算\n1. 正确: 无错。\n2. 清楚: 易懂。\n问：问题1\n参考：对\n答：二\n如{'综合得分': 7}"}]]
    writing, math = mt.questions
    assert (writing.temperature, math.temperature) == (0.7, 0.0)
    assert writing.judge(["a", "b"]) == [
        [{"role": "system", "content": ""}, {"role": "user", "content": "Write.|a"}],
        [{"role": "system", "content": "-multi-turn"}, {"role": "user", "content": "Write.|a|Again.|b"}]]
    assert [turn[1]["content"] for turn in math.judge(["a", "b"])] == ["2|1+1?|a", "2|1+1?|a|And 2?|b"]


def test_ratings_and_scores():
    assert align_rating("好。{'正确': 9, '综合得分': 4}…… {'正确': 9, '综合得分': 7}") == 7
    assert align_rating("{\"综合得分\": 6.5}") == 6.5 and align_rating("'综合得分': 3，无括号") == 3
    assert align_rating("没有分数 {1}") is None
    assert mt_rating("Rating: [[7.5]]") == 7.5 and mt_rating("[3] of 10") == 3 and mt_rating("ten") is None
    assert align_score({"数学计算": [4.0, 6.0], "逻辑推理": [9.0], "文本写作": [8.0], "角色扮演": [6.0]}) == 7.0
    assert align_score({"文本写作": [8.0]}) == 8.0 and align_score({}) is None


def test_answers_go_on_after_an_interruption(data, tmp_path):
    """The second turn knows the first; what was answered is not asked again, and half a line is dropped."""
    bench, path = read_bench("mt_bench", str(data)), tmp_path / "answers.jsonl"
    lm = Canned()
    found = answer_all(lm, bench, Store(path, "answers"), "model", None)
    assert found == {"81": ["[Write.]", "[Again.]"], "111": ["[1+1?]", "[And 2?]"]}
    assert [text for text, _ in lm.asked] == ["Write.", "1+1?", "Write./[Write.]/Again.", "1+1?/[1+1?]/And 2?"]
    assert [settings["do_sample"] for _, settings in lm.asked] == [True, False, True, False]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20], encoding="utf-8")
    again = Canned()
    assert answer_all(again, bench, Store(path, "answers"), "model", None) == found
    assert [text for text, _ in again.asked] == ["1+1?/[1+1?]/And 2?"]
    other = Canned()
    answer_all(other, bench, Store(path, "answers"), "another model", "Be brief.")
    assert next(text for text, _ in other.asked) == "Be brief./Write." and len(other.asked) == 4
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1: expected one of the answers"):
        Store(path, "answers")


def test_judge_on_the_loopback(data, tmp_path, served, monkeypatch):
    """Key and model are sent; a busy judge is asked again; ratings that are missing do not count; all is kept."""
    monkeypatch.setenv("TELECHAT_JUDGE_KEY", "secret")
    states = iter([503, 429])
    fake = served(lambda body: next(states, None) or (
        "no number" if "Again" in body["messages"][-1]["content"] else
        f"[[{len(body['messages'][-1]['content'].split('|'))}]]"))
    bench = read_bench("mt_bench", str(data))
    asked = [(messages, {"turn": turn}) for question in bench.questions
             for turn, messages in enumerate(question.judge(["a", "b"]))]
    store = Store(tmp_path / "judgments.jsonl", "judgments")
    texts = judge_all(Judge(fake.url, "referee", pause=0.01), store, asked, 2)
    assert texts == ["[[2]]", "no number", "[[3]]", "[[5]]"]
    path, key, body = fake.requests[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "referee", 0)
    assert len(fake.requests) == 6 and "secret" not in store.path.read_text(encoding="utf-8")
    found = outcome(bench, zip(["writing", "writing", "math", "math"], texts))
    assert (found.score, found.judgments, found.unread) == (10 / 3, 4, 1)
    assert found.categories == {"writing": 2.0, "math": 4.0}
    judge_all(Judge(fake.url, "referee"), Store(store.path, "judgments"), asked, 2)
    assert len(fake.requests) == 6


@pytest.mark.parametrize(("reply", "attempts", "message"), [
    (lambda body: 401, 1, "HTTP 401: busy; no key is set"), (lambda body: 500, 5, "HTTP 500"),
    (lambda body: (200, {"Content-Length": "99"}, b"{"), 5, "IncompleteRead"),
    (lambda body: (302, {"Location": "http://127.0.0.1:9/v1"}, b""), 1, "HTTP 302: it redirects to http://127.0.0.1:9/v1"
     )])
def test_judge_that_refuses(served, tmp_path, monkeypatch, reply, attempts, message):
    for name in judging.KEYS:
        monkeypatch.delenv(name, raising=False)
    fake = served(reply)
    with pytest.raises(ConfigError, match=f"{message}.*rerun the same command"):
        judge_all(Judge(fake.url, "x", pause=0.001), Store(tmp_path / "j.jsonl", "judgments"), [([], {})], 1)
    assert len(fake.requests) == attempts


def test_keys(served, tmp_path, monkeypatch):
    """The line end of a file that holds the key is not part of it; what no header can carry is refused, not shown."""
    monkeypatch.delenv("TELECHAT_JUDGE_KEY", raising=False)
    fake = served(lambda body: "[[1]]")
    monkeypatch.setenv("OPENAI_API_KEY", "abc\r\n")
    assert Judge(fake.url, "x").ask([]) == "[[1]]" and fake.requests[0][1] == "Bearer abc"
    for key in ("ab\nc", "ab\u00e9"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY: expected a one-line key of printable ASCII") as caught:
            Judge(fake.url, "x")
        assert "ab" not in str(caught.value).replace("printable", "")


def test_other_files_stay_as_they_are(tmp_path):
    """A file of something else is refused, with or without a line end; half a record goes when the next one comes."""
    path = tmp_path / "answers.jsonl"
    for text in ("{}\n", "my notes", '{"question": 1}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="line 1: expected one of the answers"):
            Store(path, "answers")
        assert path.read_text() == text
    half = '{"key": "a", "text": "b"}\n{"key": "c", "te'
    for text in (half, half[:-10], half[:-13]):
        path.write_text(text)
        store = Store(path, "answers")
        assert store.texts == {"a": "b"} and path.read_text() == text
        store.add("d", "e", {})
        assert Store(path, "answers").texts == {"a": "b", "d": "e"}


def test_other_judges_are_asked(served, tmp_path):
    first, second = served(lambda body: "[[1]]"), served(lambda body: "[[2]]")
    store = Store(tmp_path / "j.jsonl", "judgments")
    for fake, said in ((first, "[[1]]"), (second, "[[2]]"), (first, "[[1]]")):
        assert judge_all(Judge(fake.url, "x"), store, [([], {})], 1) == [said]
    assert len(first.requests) == len(second.requests) == 1


def test_files_that_differ(data):
    """A line separator of Unicode within a text is no line end; what has another form is named."""
    path = data / "mt_bench" / "question.jsonl"
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace("Write.", "Write\u2028on."), encoding="utf-8")
    assert read_bench("mt_bench", str(data)).questions[0].turns[0] == "Write\u2028on."
    path.write_text(good.replace('["Write.", "Again."]', "[]"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"question 81: expected turns to be strings, found \[\]"):
        read_bench("mt_bench", str(data))
    path.write_bytes("问题".encode("gbk"))
    with pytest.raises(ConfigError, match=r"question\.jsonl cannot be read as UTF-8"):
        read_bench("mt_bench", str(data))
    path.write_text(good, encoding="utf-8")
    (data / "mt_bench" / "reference_answer" / "gpt-4.jsonl").write_text('{"question_id": 111, "choices": []}')
    with pytest.raises(ConfigError, match=r"gpt-4\.jsonl: question 111: expected choices\[0\].turns to be strings"):
        read_bench("mt_bench", str(data))


def test_mistakes(data, tmp_path):
    for url, message in (("host:80", "expected http"), ("http://", "expected http"), ("http://a b/v1", "expected http"),
                         ("http://[::1/v1", "is not a valid URL"), ("http://a:99999/v1", "is not a valid URL"),
                         ("https://me:secret@a/v1", "must not contain a user or password")):
        with pytest.raises(ConfigError, match=message) as caught:
            Judge(url, "x")
        assert "secret" not in str(caught.value)
    for name, folder, message in (("other", data, "expected alignbench or"), ("mt_bench", None, "needs --data"),
                                  ("alignbench", tmp_path / "none", "has no folder AlignBench")):
        with pytest.raises(ConfigError, match=message):
            read_bench(name, str(folder) if folder else None)
    (data / "AlignBench" / "judge.py").write_text("prompt = 1\n")
    with pytest.raises(ConfigError, match="has no string base_prompt"):
        read_bench("alignbench", str(data))
    (data / "mt_bench" / "reference_answer" / "gpt-4.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"question 111 .math. has no reference answer"):
        read_bench("mt_bench", str(data))
    assert digest("a", "b") != digest("ab", "")


class Hum(FakeEngine):
    """Says the same word to everything, and counts its answers."""

    def __init__(self, vocab, end):
        super().__init__(64, 16, 512)
        self.vocab_size, self.word, self.end, self.answers = len(vocab), vocab.encode("hm")[-1], end, 0

    def look(self, row, end):
        row_end = int(row.tokens[end - 1]) == self.word
        self.answers += row_end
        return np.arange(self.vocab_size) == (self.end if row_end else self.word)


def test_command(data, served, tmp_path, monkeypatch, capsys):
    """--judge from the command line to the report; a second run asks nobody, another judge's model is asked again."""
    pytest.importorskip("lm_eval")
    from research.telechat.telechat_tokenizer import TelechatTokenizer
    tokenizer = TelechatTokenizer(str(train_sentencepiece(tmp_path / "tokenizer.model")))
    engine = Hum(tokenizer.vocab, Renderer(get_template("telechat"), tokenizer.vocab).end_id)
    checkpoint = tmp_path / "x.ckpt"
    checkpoint.write_bytes(b"weights")
    config = Space(parallel_config=Space(data_parallel=1, context_parallel=1, pipeline_stage=1), seq_length=512,
                   chat_template="telechat", eos_token_id=2, compute_dtype="float32")
    model = Space(config=config, scheduler=lambda settings=None: Space(engine=engine) if settings is None else
                  Scheduler(engine, settings))
    recipe = Space(load_checkpoint=str(checkpoint), context=Space(device_target="CPU"))
    monkeypatch.setattr(command, "open_model", lambda *_: (model, tokenizer, recipe))
    judge = served(lambda body: "Rating: [[6]] {'综合得分': 8}")

    def evaluate(*more):
        return command.main(["--config", str(RECIPE), "--load_checkpoint", str(checkpoint), "--data", str(data),
                             "--output", str(tmp_path / "report.json"), "--judge", "alignbench,mt_bench", *more])
    assert evaluate("--judge_url", judge.url) == 0, capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {name: (each["score"], each["questions"], each["judgments"], each["unread"])
            for name, each in report["judged"].items()} == {"alignbench": (8, 3, 3, 0), "mt_bench": (6, 2, 4, 0)}
    assert report["judge"] == {"url": judge.url, "model": "gpt-4"}
    word = tokenizer.vocab.decode([engine.word]).strip()
    assert any(f"答：{word}\n" in asked["messages"][-1]["content"] for _, _, asked in judge.requests)
    assert (engine.answers, len(judge.requests)) == (7, 7) and "mt_bench" in capsys.readouterr().out
    assert evaluate("--judge_url", judge.url) == 0 and (engine.answers, len(judge.requests)) == (7, 7)
    assert evaluate("--judge_url", judge.url, "--judge_model", "other") == 0
    assert (engine.answers, len(judge.requests)) == (7, 14) and judge.requests[-1][2]["model"] == "other"
    capsys.readouterr()
    assert evaluate() == 1 and "error: --judge needs --judge_url" in capsys.readouterr().err
