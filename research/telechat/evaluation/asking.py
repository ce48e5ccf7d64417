"""Answers of our model to the questions of a judged benchmark, turn by turn, saved as they come. No MindSpore here."""
from typing import Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from research.telechat.common.files import JsonObject
from research.telechat.evaluation.judge import Store, digest
from research.telechat.evaluation.judged import Bench, Messages

ANSWER_TOKENS = 2048             # of an answer; FastChat's llm_judge uses 1024, AlignBench sets no limit


class _Asked(NamedTuple):
    args: Tuple[str, JsonObject]


class Generates(Protocol):
    """The part of `TelechatLM` that is used here."""

    batch_size: int

    def apply_chat_template(self, chat_history: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation."""

    def generate_until(self, requests: Sequence[_Asked]) -> List[str]:
        """The answer to each prompt."""


def answer_all(lm: Generates, bench: Bench, store: Store, identity: str, system: Optional[str], keep: bool = True
               ) -> Dict[str, List[str]]:
    """Answers to all turns of each question, {its number: answers}; those in `store` are taken from there.

    Args:
        lm: the model.
        bench: its questions.
        store: of answers.
        identity: of the model and its settings.
        system: a system prompt, if any.
        keep: write new answers to the store's file (in a parallel run, one process does).
    """
    answers: Dict[str, List[str]] = {question.number: [] for question in bench.questions}
    for turn in range(max(len(question.turns) for question in bench.questions)):
        waiting = []
        for question in bench.questions:
            if len(question.turns) > turn:
                messages: Messages = [{"role": "system", "content": system}] if system else []
                for asked, answer in zip(question.turns, answers[question.number]):
                    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                messages.append({"role": "user", "content": question.turns[turn]})
                waiting.append((question, messages, digest(identity, messages, question.temperature)))
        todo = [each for each in waiting if each[2] not in store.texts]
        for start in range(0, len(todo), 4 * lm.batch_size):         # each part is saved before the next begins
            part = todo[start:start + 4 * lm.batch_size]
            texts = lm.generate_until([_Asked((lm.apply_chat_template(messages), _settings(question.temperature)))
                                       for question, messages, _ in part])
            for (question, _, key), text in zip(part, texts):
                if keep:
                    store.add(key, text, {"bench": bench.name, "question": question.number, "turn": turn + 1})
                else:
                    store.texts[key] = text
        for question, _, key in waiting:
            answers[question.number].append(store.texts[key])
    return answers


def _settings(temperature: float) -> JsonObject:
    return {"until": [], "max_gen_toks": ANSWER_TOKENS, "do_sample": temperature > 0, "temperature": temperature}
