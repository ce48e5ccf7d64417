"""Answers in OpenAI's format: complete, or as chunks of a stream."""
import time
import uuid
from typing import Dict, List, Optional, Sequence, Tuple

from research.telechat.common.files import JsonObject
from research.telechat.generation.requests import Alternatives, PromptScores, Token
from research.telechat.serve.answering import Update, Usage
from research.telechat.text.vocab import IncrementalDecoder, Vocab


def usage_object(usage: Usage) -> JsonObject:
    """The token counts of a request."""
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}


def token_text(vocab: Vocab, token: int) -> str:
    """A token as text; incomplete characters as OpenAI writes them, bytes:\\xe4\\xb8."""
    data = vocab.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Writer:
    """The common part of chunks and complete answers of one request."""

    kind = ""
    prefix = ""

    def __init__(self, model: str, vocab: Vocab, choices: int, logprobs: bool):
        self.vocab, self.logprobs = vocab, logprobs
        self.choices = choices
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "object": "", "created": int(time.time()),
                      "model": model}

    def _object(self, kind: str, choices: List[JsonObject], **more: object) -> JsonObject:
        return {**self._head, "object": kind, "choices": choices, **more}

    def usage_chunk(self, usage: Usage) -> JsonObject:
        """The last chunk of a stream with include_usage."""
        return self._object(self._chunk_kind, [], usage=usage_object(usage))

    @property
    def _chunk_kind(self) -> str:
        return self.kind


class ChatWriter(Writer):
    """/v1/chat/completions."""

    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, model: str, vocab: Vocab, choices: int, logprobs: bool):
        super().__init__(model, vocab, choices, logprobs)
        self._calls = [0] * choices
        self._parts: List[JsonObject] = [{"content": "", "reasoning": "", "calls": [], "tokens": [], "finish": ""}
                                         for _ in range(choices)]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk"

    def begin(self) -> List[JsonObject]:
        """The first chunks: the role of the message."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.choices)]

    def chunks(self, update: Update) -> List[JsonObject]:
        """The chunks of an update."""
        made = []
        part = update.part
        if part.reasoning:
            made.append(self._chunk(update.answer, {"reasoning_content": part.reasoning}))
        if part.content:
            made.append(self._chunk(update.answer, {"content": part.content}))
        for call in part.calls:
            number = self._calls[update.answer]
            self._calls[update.answer] += 1
            made.append(self._chunk(update.answer, {"tool_calls": [{"index": number, **_call(call)}]}))
        if update.finish:
            made.append(self._chunk(update.answer, {}, update.finish))
        if self.logprobs and update.tokens:
            if not made:
                made.append(self._chunk(update.answer, {}))
            made[0]["choices"][0]["logprobs"] = self._logprobs(update.tokens)
        return made

    def _chunk(self, index: int, delta: JsonObject, finish: Optional[str] = None) -> JsonObject:
        return self._object(self._chunk_kind, [{"index": index, "delta": delta, "logprobs": None,
                                                "finish_reason": finish}])

    def add(self, update: Update) -> None:
        """Gather an update for `whole`."""
        gathered, part = self._parts[update.answer], update.part
        gathered["content"] += part.content
        gathered["reasoning"] += part.reasoning
        gathered["calls"] += part.calls
        gathered["tokens"] += update.tokens
        gathered["finish"] = update.finish

    def whole(self, usage: Usage) -> JsonObject:
        """The answer, once all is gathered."""
        choices = []
        for index, parts in enumerate(self._parts):
            message: JsonObject = {"role": "assistant", "content": parts["content"]}
            if parts["reasoning"]:
                message["reasoning_content"] = parts["reasoning"]
            if parts["calls"]:
                message["content"] = parts["content"] or None
                message["tool_calls"] = [_call(call) for call in parts["calls"]]
            choices.append({"index": index, "message": message, "finish_reason": parts["finish"],
                            "logprobs": self._logprobs(parts["tokens"]) if self.logprobs else None})
        return self._object(self.kind, choices, usage=usage_object(usage))

    def _logprobs(self, tokens: Sequence[Token]) -> JsonObject:
        return {"content": [{**self._logprob(token.id, token.logprob),
                             "top_logprobs": [self._logprob(*pair) for pair in token.top]} for token in tokens]}

    def _logprob(self, token: int, logprob: Optional[float]) -> JsonObject:
        data = self.vocab.token_bytes(token)
        return {"token": token_text(self.vocab, token), "logprob": logprob, "bytes": list(data)}


def _call(call: JsonObject) -> JsonObject:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}


class CompletionWriter(Writer):
    """/v1/completions. `echoes`: the text and tokens of each choice's prompt, echoed before its answer; empty without
    echo."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, model: str, vocab: Vocab, choices: int, logprobs: bool,
                 echoes: Sequence[Tuple[str, Sequence[int]]] = (), nothing_more: bool = False):
        """nothing_more: no answer, only the prompt's echo."""
        super().__init__(model, vocab, choices, logprobs)
        self._echoes, self._nothing_more = list(echoes), nothing_more
        self._texts, self._finish = [""] * choices, [""] * choices
        self._tokens: List[List[Token]] = [[] for _ in range(choices)]
        self._scores: List[Optional[PromptScores]] = [None] * choices
        self._echoed = [False] * choices
        self._offsets = [0] * choices
        self._decoders = [IncrementalDecoder(vocab) for _ in range(choices)]
        self._behind = [False] * choices                 # the prompt, in an echo

    def begin(self) -> List[JsonObject]:
        """A stream of completions has no opening chunk."""
        return []

    def chunks(self, update: Update) -> List[JsonObject]:
        """The chunks of an update."""
        index = update.answer
        if update.scores is not None:
            self._scores[index] = update.scores
        text = "" if self._nothing_more else update.part.content
        tokens: Sequence[Token] = () if self._nothing_more else update.tokens
        if not (text or tokens or update.finish):
            return []
        echo, scores = "", None
        if self._echoes and not self._echoed[index]:
            self._echoed[index] = True
            echo, scores = self._echoes[index][0], self._scores[index]
        logprobs = self._logprobs(index, tokens, scores) if self.logprobs else None
        return [self._object(self.kind, [{"index": index, "text": echo + text, "logprobs": logprobs,
                                          "finish_reason": update.finish or None}])]

    def add(self, update: Update) -> None:
        """Gather an update for `whole`."""
        index = update.answer
        if update.scores is not None:
            self._scores[index] = update.scores
        if not self._nothing_more:
            self._texts[index] += update.part.content
            self._tokens[index] += update.tokens
        self._finish[index] = update.finish

    def whole(self, usage: Usage) -> JsonObject:
        """The answer, once all is gathered."""
        choices = []
        for index in range(self.choices):
            echo = self._echoes[index][0] if self._echoes else ""
            scores = self._scores[index] if self._echoes else None
            logprobs = self._logprobs(index, self._tokens[index], scores) if self.logprobs else None
            choices.append({"index": index, "text": echo + self._texts[index], "logprobs": logprobs,
                            "finish_reason": self._finish[index]})
        return self._object(self.kind, choices, usage=usage_object(usage))

    def _logprobs(self, index: int, tokens: Sequence[Token], scores: Optional[PromptScores]) -> JsonObject:
        """Log-probabilities of the prompt's tokens, if there are scores, and of the answer's."""
        rows: List[Tuple[int, Optional[float], Alternatives]] = []
        if scores is not None:
            rows += zip(self._echoes[index][1], scores.logprobs, scores.top)
        rows += [(token.id, token.logprob, token.top) for token in tokens]
        found: Dict[str, List[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, top in rows:
            text = token_text(self.vocab, token)
            found["tokens"].append(text)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(None if logprob is None else self._top(token, logprob, top))
            if len(found["tokens"]) > len(scores.logprobs if scores else ()) and not self._behind[index]:
                self._behind[index] = True
                self._decoders[index] = IncrementalDecoder(self.vocab)
            found["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].feed(token))
        return dict(found)

    def _top(self, token: int, logprob: float, top: Alternatives) -> Dict[str, float]:
        """The most likely tokens and this one; of tokens with the same text, the most likely one."""
        written: Dict[str, float] = {}
        for other, value in (*top, (token, logprob)):
            written.setdefault(token_text(self.vocab, other), value)
        return written
