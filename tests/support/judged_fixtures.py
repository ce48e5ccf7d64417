"""Made-up questions of AlignBench and MT-bench in their published files, and a made-up judge."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from card_fixtures import write_lines

PROMPT = "类型{category}\n{dimensions}问：{question}\n参考：{reference}\n答：{answer}\n如{{'综合得分': 7}}"


def write_judged_sets(folder):
    """Made-up questions of both benchmarks in their published files."""
    align = folder / "AlignBench"
    write_lines(align / "data" / "data_v1.1_release.jsonl", [
        {"question_id": number, "category": category, "subcategory": kind, "question": f"问题{number}",
         "reference": "对"}
        for number, category, kind in ((1, "数学计算", "初等数学"), (2, "文本写作", "翻译"), (3, "文本写作", "翻译"))])
    (align / "config").mkdir()
    for name, content in (("subcategory_question_mapping", {"初等数学": "推理型", "翻译": "生成型"}),
                          ("dimension_set", {"推理型": ["正确", "清楚"], "生成型": ["丰富"]}),
                          ("dimension_definition", {"正确": "无错。", "清楚": "易懂。", "丰富": "详细。"}),
                          ("temperature", {"数学计算": 0.1, "文本写作": 0.7})):
        (align / "config" / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    half = len(PROMPT) // 2
    (align / "judge.py").write_text(
        f"raise SystemExit\ndef prompt_construct():\n    base_prompt = {PROMPT[:half]!r} \\\n"
        f"        {PROMPT[half:]!r}\n", encoding="utf-8")
    mt = folder / "mt_bench"
    write_lines(mt / "question.jsonl", [{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
                                        {"question_id": 111, "category": "math", "turns": ["1+1?", "And 2?"]}])
    write_lines(mt / "reference_answer" / "gpt-4.jsonl", [{"question_id": 111, "choices": [{"turns": ["2", "4"]}]}])
    write_lines(mt / "judge_prompts.jsonl", [
        {"name": f"single-{kind}v1{end}", "system_prompt": f"{kind}{end}", "prompt_template": "|".join(
            "{" + name + "}" for name in [*(["ref_answer_1"] if kind else []), *(
                ["question_1", "answer_1", "question_2", "answer_2"] if end else ["question", "answer"])])}
        for kind in ("", "math-") for end in ("", "-multi-turn")])


class FakeJudge:
    """A judge on the loopback, past any proxy.

    reply: from the request: what it says, or an HTTP status, or (status, headers, bytes)."""

    def __init__(self, reply):
        outer, self.requests, self.reply = self, [], reply
        self._environment = pytest.MonkeyPatch()
        self._environment.setenv("no_proxy", "127.0.0.1")

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers.get("Authorization"), body))
                said = outer.reply(body)
                if isinstance(said, int):
                    said = (said, {}, b"busy")
                elif isinstance(said, str):
                    said = (200, {}, json.dumps({"choices": [{"message": {"content": said}}]}).encode())
                status, headers, data = said
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self._environment.undo()
