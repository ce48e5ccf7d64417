"""Messages, and a renderer for every way of writing conversations that there is."""
from research.telechat.text.renderer import Renderer, get_template


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "bot", "content": text}


def system(text):
    return {"role": "system", "content": text}


def renderers(vocabs):
    """A renderer for every way of writing there is."""
    reserve = {"start_token": "<reserve3>", "user_token": "<reserve1>", "bot_token": "<reserve2>", "pad_token": "<pad>"}
    return {
        "7b": Renderer(get_template("telechat"), vocabs["7b"], pad_token="<pad>"),
        "12b": Renderer(get_template("telechat"), vocabs["12b"]),
        "12b with start": Renderer(get_template("telechat"), vocabs["12b"], start_token="<_start>"),
        "52b in words": Renderer(get_template("telechat_52b"), vocabs["52b"]),
        "52b with tokens": Renderer(get_template("telechat_52b"), vocabs["52b"], **reserve),
        "telechat2": Renderer(get_template("telechat2"), vocabs["telechat2"]),
    }
