"""Validates bodies of /v1/chat/completions and /v1/completions. Unsupported options that would change the answer are
refused, never ignored; unknown keys are logged once.
"""
from dataclasses import dataclass
from typing import AbstractSet, Dict, List, Optional, Tuple, Union

from research.telechat.common.files import JsonObject
from research.telechat.serve.errors import ApiError
from research.telechat.serve.fields import Fields, shown

MAX_TOKENS = 10_000_000                     # upper bound for numbers that the context limits anyway
_STOPS, _STOP_LENGTH, _TOP, _BIASES = 16, 512, 20, 1024
_SHARED = {"model", "stream", "stream_options", "n", "temperature", "top_p", "top_k", "repetition_penalty",
           "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "ignore_eos", "stop", "seed",
           "max_tokens", "logprobs", "user"}
# Accepted without effect, except parallel_tool_calls in a chat.
_WITHOUT_MEANING = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity",
                    "prompt_cache_retention", "parallel_tool_calls"}
# What other servers can change and this one does not: only as it is here.
_AS_IT_IS = {"skip_special_tokens": True, "spaces_between_special_tokens": True, "add_generation_prompt": True,
             "continue_final_message": False, "reasoning_effort": "medium"}
CHAT_KEYS = _SHARED | _WITHOUT_MEANING | set(_AS_IT_IS) | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format", "functions",
    "function_call", "modalities", "audio", "prediction"}
COMPLETION_KEYS = _SHARED | _WITHOUT_MEANING | set(_AS_IT_IS) | {"prompt", "echo", "best_of", "suffix"}


@dataclass(frozen=True)
class Asked:
    """The common part of both APIs. `sampling`: fields of Sampling that are set; `top_logprobs`: -1 for none."""

    n: int
    stream: bool
    include_usage: bool
    sampling: JsonObject
    max_tokens: Optional[int]
    stop: Tuple[str, ...]
    seed: Optional[int]
    ignore_eos: bool
    top_logprobs: int


@dataclass(frozen=True)
class ChatBody:
    """A body of /v1/chat/completions. `tools`: those to render, none with tool_choice none; `called`: tools of which
    one must be called; `schema`: JSON schema of the answer."""

    asked: Asked
    messages: List[JsonObject]
    tools: List[JsonObject]
    called: List[JsonObject]
    several_calls: bool
    schema: Optional[JsonObject]


@dataclass(frozen=True)
class CompletionBody:
    """A body of /v1/completions. `prompts`: texts or token ids."""

    asked: Asked
    prompts: List[Union[str, List[int]]]
    echo: bool


def read_chat(body: JsonObject, max_choices: int, max_messages: int) -> ChatBody:
    """Raises ApiError."""
    fields = Fields(body)
    messages = fields.items("messages")
    if not messages or len(messages) > max_messages:
        raise ApiError(400, f"messages: expected a list of 1 to {max_messages} messages, found "
                            f"{len(messages) if messages is not None else 'none'}", "messages")
    for key in ("functions", "function_call", "audio", "prediction"):
        if fields.get(key):
            raise ApiError(400, f"{key} is not supported" + ("; use tools" if "function" in key else ""), key)
    if fields.get("modalities") not in (None, ["text"]):
        raise fields.wrong("modalities", '["text"]')
    top = -1
    if fields.flag("logprobs"):
        top = fields.integer("top_logprobs", 0, _TOP) or 0
    elif fields.integer("top_logprobs", 0, _TOP):
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    longest = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    if longest is None:
        longest = fields.integer("max_tokens", 1, MAX_TOKENS)
    tools, called = _read_tools(fields)
    schema = _read_schema(fields)
    if schema is not None and called:
        raise ApiError(400, "response_format and a tool_choice that forces a call are mutually exclusive",
                       "response_format")
    return ChatBody(_read_asked(fields, max_choices, longest, top), messages, tools, called,
                    fields.flag("parallel_tool_calls", True), schema)


def read_completion(body: JsonObject, max_choices: int, max_prompts: int) -> CompletionBody:
    """Raises ApiError."""
    fields = Fields(body)
    if fields.get("suffix"):
        raise ApiError(400, "suffix is not supported", "suffix")
    echo = fields.flag("echo")
    top = -1
    if fields.get("logprobs") is not None and fields.get("logprobs") is not False:
        top = 1 if fields.get("logprobs") is True else fields.integer("logprobs", 0, _TOP) or 0
    longest = fields.integer("max_tokens", 0 if echo else 1, MAX_TOKENS)
    asked = _read_asked(fields, max_choices, 16 if longest is None else longest, top)
    best = fields.integer("best_of", 1, max_choices)
    if best not in (None, asked.n):
        raise fields.wrong("best_of", f"the value of n ({asked.n}), because answers are not ranked")
    prompts = _read_prompts(fields)
    if len(prompts) * asked.n > max_prompts:
        raise ApiError(400, f"prompt: {len(prompts)} prompts with {asked.n} answers each, but the limit per request is "
                            f"{max_prompts} answers", "prompt")
    return CompletionBody(asked, prompts, echo)


def _read_prompts(fields: Fields) -> List[Union[str, List[int]]]:
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return list(prompt)
        if _are_tokens(prompt):
            return [prompt]
        if all(isinstance(one, list) and one and _are_tokens(one) for one in prompt):
            return list(prompt)
    raise fields.wrong("prompt", "text, a list of strings, token ids, or a list of lists of token ids")


def _are_tokens(values: List[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _read_asked(fields: Fields, max_choices: int, longest: Optional[int], top: int) -> Asked:
    for key, only in _AS_IT_IS.items():
        if fields.get(key) not in (None, only):
            raise fields.wrong(key, f"{shown(only)}, the only supported value")
    sampling: JsonObject = {}
    temperature = fields.number("temperature", 0, 2)
    if temperature is not None:
        sampling.update({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False})
    for key, value in (("top_p", fields.number("top_p", 0, 1, open_low=True)),
                       ("top_k", fields.integer("top_k", -1, MAX_TOKENS)),
                       ("repetition_penalty", fields.number("repetition_penalty", 0, 100, open_low=True)),
                       ("presence_penalty", fields.number("presence_penalty", -2, 2)),
                       ("frequency_penalty", fields.number("frequency_penalty", -2, 2)),
                       ("min_new_tokens", fields.integer("min_tokens", 0, MAX_TOKENS))):
        if value is not None:
            sampling[key] = max(value, 0) if key == "top_k" else value
    bias = _read_bias(fields)
    if bias:
        sampling["logit_bias"] = bias
    seed = fields.integer("seed", -2 ** 63, 2 ** 64 - 1)
    stream = fields.flag("stream")
    options = fields.item("stream_options") or {}
    if options and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    return Asked(fields.integer("n", 1, max_choices) or 1, stream, Fields(options).flag("include_usage"), sampling,
                 longest, _read_stop(fields), None if seed is None else seed % 2 ** 32, fields.flag("ignore_eos"), top)


def _read_stop(fields: Fields) -> Tuple[str, ...]:
    stop = fields.get("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _STOPS or not all(
            isinstance(one, str) and 0 < len(one) <= _STOP_LENGTH for one in stops):
        raise fields.wrong("stop", f"text, or a list of at most {_STOPS} strings of 1 to {_STOP_LENGTH} characters")
    return tuple(stops)


def _read_bias(fields: Fields) -> Tuple[Tuple[int, float], ...]:
    bias = fields.item("logit_bias") or {}
    expected = f"at most {_BIASES} token ids, each with a number from -100 to 100"
    if len(bias) > _BIASES:
        raise ApiError(400, f"logit_bias: expected {expected}, found {len(bias)} tokens", "logit_bias")
    pairs = []
    for token, value in bias.items():
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and -100 <= value <= 100
        if not good or not (token.isascii() and token.isdigit()) or len(token) > 9:
            raise fields.wrong("logit_bias", expected)
        pairs.append((int(token), float(value)))
    return tuple(pairs)


def _read_tools(fields: Fields) -> Tuple[List[JsonObject], List[JsonObject]]:
    """(tools to show to the model, functions of which one must be called)."""
    tools = fields.items("tools") or []
    functions: Dict[str, JsonObject] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict) or not isinstance(
                function.get("name"), str) or not function["name"]:
            raise ApiError(400, f"tools: number {number + 1} is {shown(tool)}; expected type function and a function "
                                "with a name", "tools")
        if not isinstance(function.get("parameters") or {}, dict):
            raise ApiError(400, f"tools: the parameters of {function['name']} must be a JSON schema", "tools")
        functions[function["name"]] = function
    choice = fields.get("tool_choice")
    if choice is None or (choice == "auto"):
        return tools, []
    if choice == "none":
        return [], []
    if not tools:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    if choice == "required":
        return tools, list(functions.values())
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) and isinstance(
        choice.get("function", {}), dict) else None
    if not isinstance(name, str) or name not in functions:
        raise fields.wrong("tool_choice", "none, auto, required, or one of the functions in tools")
    return tools, [functions[name]]


def _read_schema(fields: Fields) -> Optional[JsonObject]:
    chosen = fields.item("response_format")
    kind = "text" if chosen is None else chosen.get("type")
    if kind == "text" or chosen is None:
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = chosen.get("json_schema")
    if kind != "json_schema" or not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise fields.wrong("response_format", 'type text, json_object, or json_schema with a "schema"')
    schema: JsonObject = inner["schema"]
    return schema


def unknown_keys(body: JsonObject, known: AbstractSet[str]) -> List[str]:
    """Keys of the body that are not in `known`."""
    return sorted(key for key in body if key not in known)
