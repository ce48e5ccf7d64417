"""Serve a model over HTTP: OpenAI's API, those that TeleChat had before, and a chat page.

    telechat serve --config research/telechat/predict_telechat_12b.yaml \
        --load_checkpoint telechat_12b.ckpt --tokenizer tokenizer.model
    telechat serve --demo                                              the model of the quick start
    bash scripts/msrun_launcher.sh "scripts/serve.py --config ... --use_parallel True" 8
                                          a model sharded over cards: rank 0 serves, the others compute what it orders

Needs the packages of the extra `serve`. docs/server.md has the routes, the limits and the differences from OpenAI's.

What begins threads when it is imported, as NumPy does, is imported in functions: signals are blocked before.
"""
import argparse
import ipaddress
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable, List, Optional, Tuple, Union

from research.telechat.commands.help_text import HelpFormatter
from research.telechat.common.command import INTERRUPTED, run_command
from research.telechat.common.environment import rank, workers, writes
from research.telechat.common.errors import ConfigError

if TYPE_CHECKING:
    from research.telechat.common.files import JsonObject
    from research.telechat.generation.ranks import Follower, Leader
    from research.telechat.generation.scheduler import Ranks
    from research.telechat.serve.answering import Engine
    from research.telechat.serve.host import Host

KEY_VARIABLE = "TELECHAT_API_KEY"
_DEMO_RECIPE = "predict_telechat_tiny_cpu.yaml"
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_STUCK = 10.0                            # seconds after which a rank that waits for rank 0 on the device is ended
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_new_tokens")


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    from research.telechat.recipe.options import add_sampling_options, str2bool
    parser = argparse.ArgumentParser(description="Serve a TeleChat model over HTTP.", formatter_class=HelpFormatter,
                                     epilog="Keys of the recipe can be set as in run_mindformer.py: "
                                            "--model.model_config.seq_length 4096.")
    add = parser.add_argument
    add("--config", default="", help="predict recipe, e.g. research/telechat/predict_telechat_12b.yaml")
    add("--load_checkpoint", help="checkpoint; default: that of the recipe")
    add("--tokenizer", default="", help="tokenizer.model or tokenizer.json; default: that of the recipe")
    add("--demo", nargs="?", const="quickstart_output", metavar="FOLDER",
        help="serve the model trained by the quick start (FOLDER: its results, default quickstart_output)")
    add("--generation_config", default="", help="generation_config.json, or its folder: sampling settings for "
                                                "requests that set none; default: the recipe's")
    add("--use_parallel", type=str2bool, help="run as one of several processes (msrun)")
    add("--auto_trans_ckpt", type=str2bool, help="shard a complete checkpoint for the parallel plan")
    add("--output_dir", help="folder of logs")
    add("--host", default="127.0.0.1", help="address to listen on; other than loopback it needs a key")
    add("--port", type=int, default=8000, help="port to listen on (the official service uses 8070)")
    add("--served_model_name", help="name of the model in the API; default: trainer.model_name of the recipe")
    add("--key_file", help=f"file with one key per line, any of which clients may send; or the variable {KEY_VARIABLE}")
    add("--no_key", action="store_true", help="allow other addresses than loopback without a key")
    add("--allow_origin", nargs="+", default=[], metavar="ORIGIN",
        help="web origins that may send requests, such as https://chat.example.org; * for all")
    add("--open_metrics", action="store_true", help="/metrics needs no key")
    add("--slots", type=int, default=16, help="answers generated at the same time")
    add("--deterministic", action="store_true", help="compute each answer on its own: slower, bit-identical")
    add("--max_queue", type=int, default=64, help="maximum queued requests; more get 429")
    add("--queue_timeout", type=float, default=0, help="maximum seconds in the queue; 0: no limit")
    add("--max_body", type=int, default=1 << 20, help="maximum bytes of a request")
    add("--max_messages", type=int, default=1024, help="maximum messages of a conversation")
    add("--max_connections", type=int, default=1024, help="maximum open connections")
    add("--requests_per_minute", type=int, default=0, help="per client address; 0: no limit")
    add("--grace", type=float, default=30, help="seconds for running requests after SIGTERM")
    add("--send_timeout", type=float, default=30, help="seconds after which a client that does not read its answer is "
                                                       "disconnected")
    add_sampling_options(parser, ", unless the request sets it")
    return parser


def read_keys(args: argparse.Namespace) -> Tuple[str, ...]:
    """The keys that clients may send. Raises ConfigError: none where one is needed, or a file without any."""
    keys: List[str] = []
    if args.key_file:
        try:
            keys = [line.strip() for line in Path(args.key_file).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"--key_file: {args.key_file} cannot be read: {err}; expected one key per line") from err
        keys = [key for key in keys if key]
        if not keys:
            raise ConfigError(f"--key_file: {args.key_file} contains no key; expected one per line")
    elif os.environ.get(KEY_VARIABLE):
        keys = [os.environ[KEY_VARIABLE].strip()]
    if not keys and not args.no_key and not is_loopback(args.host):
        raise ConfigError(f"--host: {args.host} is reachable from other machines, so a key is needed: pass --key_file "
                          f"or {KEY_VARIABLE}, or --no_key")
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_demo(folder: Path) -> Tuple[Path, Path]:
    """(checkpoint, tokenizer) of a quick start's results. Raises ConfigError where it has not been run."""
    tokenizer = folder / "tokenizer" / "tokenizer.model"
    checkpoints = sorted((folder / "finetune" / "checkpoint").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints or not tokenizer.is_file():
        raise ConfigError(f"--demo: {folder} does not contain the results of the quick start; run bash "
                          "scripts/quickstart.sh first, or pass its folder")
    return checkpoints[-1], tokenizer


def complete(args: argparse.Namespace) -> None:
    """Fill in what --demo stands for, and check the rest. Raises ConfigError."""
    if args.demo:
        if args.config or args.load_checkpoint or args.tokenizer:
            raise ConfigError("--demo: it sets --config, --load_checkpoint and --tokenizer itself; omit them")
        checkpoint, tokenizer = find_demo(Path(args.demo))
        args.config, args.load_checkpoint, args.tokenizer = _DEMO_RECIPE, str(checkpoint), str(tokenizer)
        args.output_dir = args.output_dir or str(Path(args.demo) / "serve")
    if not args.config:
        raise ConfigError("--config is missing; pass a predict recipe, e.g. research/telechat/predict_telechat_12b.yaml"
                          ", or --demo for the model of the quick start")
    for name, low, high in (("port", 0, 65535), ("slots", 1, 4096), ("max_queue", 0, 1_000_000), ("grace", 0, 86400),
                            ("max_body", 1024, 1 << 30), ("max_messages", 1, 1_000_000), ("queue_timeout", 0, 86400),
                            ("max_connections", 2, 65536), ("requests_per_minute", 0, 1_000_000),
                            ("send_timeout", 1, 86400)):
        if not low <= getattr(args, name) <= high:
            raise ConfigError(f"--{name}: expected a number from {low} to {high}, found {getattr(args, name)}")


def load_engine(args: argparse.Namespace, overrides: "JsonObject", join: "Callable[[], Ranks]") -> "Engine":
    """The model of the options, its graphs compiled. join: called among several ranks, once the model is loaded. Raises
    ConfigError."""
    from research.telechat.common.tokens import end_tokens
    from research.telechat.common.versions import fitting_versions
    with fitting_versions():
        from mindformers.generation.generation_config import GenerationConfig

        from research.telechat.chat.api import read_generation_config
        from research.telechat.generation.passes import Settings
        from research.telechat.generation.sampling import Sampling
        from research.telechat.run.load import load_model, prepare_prediction, quieten
        from research.telechat.serve.answering import Engine
        from research.telechat.text.renderer import Renderer
        from research.telechat.text.templates import choose_template
    config, tokenizer = prepare_prediction(args.config, overrides, args.tokenizer)
    if config.use_parallel and workers() == 1:
        raise ConfigError("use_parallel: the model is sharded over several cards, but this is a single process; start "
                          "it with scripts/msrun_launcher.sh, or set --use_parallel False")
    if workers() > 1 and not config.use_parallel:
        raise ConfigError(f"use_parallel: {workers()} processes were started for one model; set --use_parallel True, "
                          "or start one process per model, each on its own --port")
    quieten()
    model = load_model(config)
    chosen = (read_generation_config(args.generation_config) if args.generation_config else
                   GenerationConfig.from_model_config(model.config))
    settings = {key: getattr(args, key, None) if getattr(args, key, None) is not None else getattr(chosen, key, None)
                for key in (*_SAMPLING, "max_new_tokens")}
    longest = settings.pop("max_new_tokens")
    sampling = Sampling(**{key: value for key, value in settings.items() if value is not None})
    buckets = (*(size for size in (1, 4, 16, 64) if size < args.slots), args.slots)
    scheduler = model.scheduler(Settings(slots=args.slots, buckets=buckets, max_queue=args.max_queue,
                                         deterministic=args.deterministic), join() if workers() > 1 else None)
    _say("compiling ...")
    scheduler.warm_up()
    renderer = Renderer(choose_template(tokenizer.vocab, model.config.chat_template), tokenizer.vocab)
    return Engine(scheduler, renderer, model.config.seq_length, model.config.vocab_size, sampling, longest,
                  frozenset(end_tokens(chosen.eos_token_id)))


def lead(host: "Host") -> "Leader":
    """Rank 0 of several: the others follow its scheduler, until it is closed."""
    from research.telechat.generation.ranks import DRAIN, Leader
    from research.telechat.run.meeting import invite
    return Leader(invite(), workers() - 1, on_word=lambda word: host.drain() if word == DRAIN else None,
                  on_loss=host.lose)


def follow(args: argparse.Namespace, overrides: "JsonObject") -> int:
    """A rank other than 0: computes what rank 0 orders. Returns the exit code; raises ConfigError, WorkerError."""
    from research.telechat.generation.ranks import DRAIN, Follower
    followers: List[Follower] = []

    def join() -> Follower:
        from research.telechat.run.meeting import accept_invitation
        followers.append(Follower(*accept_invitation(), on_loss=_end_if_stuck))
        return followers[0]

    def pass_on_signals() -> None:
        while True:
            signal.sigwait(_SIGNALS)
            if not followers:
                os._exit(INTERRUPTED)
            followers[0].say(DRAIN)
    if os.environ.get("MS_ROLE") == "MS_SCHED":              # it waits in MindSpore until the ranks have ended
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    else:
        threading.Thread(target=pass_on_signals, name="signals", daemon=True).start()
    engine = load_engine(args, overrides, join)
    with followers[0] as follower:
        _say(f"ready: rank {rank()} follows rank 0")
        follower.run(engine.scheduler)  # type: ignore[arg-type]    # a Scheduler, see load_engine
        _say_launches(follower)
    return 0


def _end_if_stuck() -> None:
    """Called when rank 0 is gone. The main thread ends the process, unless it waits on the device for rank 0."""
    time.sleep(_STUCK)
    print("error: rank 0 is gone; see its log", file=sys.stderr, flush=True)
    os._exit(1)


def _say_launches(ranks: "Union[Leader, Follower]") -> None:
    """The same on all ranks, or they have not computed the same."""
    count, digest = ranks.noted()
    _say(f"rank {rank()}: {count} launches, digest {digest:08x}")


def run(args: argparse.Namespace, rest: List[str]) -> int:
    """Serve; returns the exit code. Raises ConfigError."""
    from research.telechat.common.console import only_own_warnings
    from research.telechat.common.files import prepare_log
    from research.telechat.recipe.options import overrides_of, parse_further
    from research.telechat.recipe.read import read_recipe, resolve_config
    complete(args)
    keys = read_keys(args)
    recipe = read_recipe(resolve_config(args.config))
    name = args.served_model_name or str((recipe.get("trainer") or {}).get("model_name") or Path(args.config).stem)
    overrides = {**overrides_of(args, ["load_checkpoint", "use_parallel", "auto_trans_ckpt", "output_dir"]),
                 **parse_further(rest)}
    prepare_log(overrides.get("output_dir"))
    only_own_warnings()
    if workers() > 1 and not writes():
        return follow(args, overrides)
    try:
        from research.telechat.serve.app import make_app
        from research.telechat.serve.host import Host, Times, Web, listen
        from research.telechat.serve.http import Access
        from research.telechat.serve.service import Limits, Service
    except ModuleNotFoundError as err:
        raise ConfigError(f"the package {err.name} is missing; install those of the server: pip install starlette "
                          "uvicorn prometheus-client (the extra `serve`)") from err
    local = is_loopback(args.host)
    service = Service(name, Limits(args.max_body, args.max_messages, queue_timeout=args.queue_timeout))
    app = make_app(service, Access(keys, local, tuple(args.allow_origin), args.open_metrics, args.requests_per_minute))
    listener = listen(args.host, args.port)
    times = Times(grace=args.grace, send=args.send_timeout)
    port = listener.getsockname()[1]
    shown = "localhost" if local else f"[{args.host}]" if ":" in args.host else args.host
    where = f"http://{shown}:{port}"

    def ready() -> None:
        _say(f"ready: {name}\n  chat in a browser: {where}/\n  OpenAI's API:      {where}/v1\n"
             "Ctrl-C or SIGTERM stops the server once running answers are finished; a second one stops it at once.")
    _say(f"loading {name}; {where}/ready responds with 200 when it is ready")
    host = Host(service, Web(app, listener, times, args.max_connections), times)
    leaders: List[Leader] = []

    def join() -> "Ranks":
        leaders.append(lead(host))
        return leaders[0]
    code = 1
    try:
        code = host.run(lambda: load_engine(args, overrides, join), ready)
    finally:
        for leader in leaders:
            leader.close(code != 1)
    for leader in leaders:
        _say_launches(leader)
    return code


def _say(text: str) -> None:
    print(text, flush=True)


def _log_to_stderr() -> None:
    """One line for each request, without contents."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("telechat.serve")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def main(argv: Optional[List[str]] = None) -> int:
    """Run; returns the exit code (common/command.py)."""
    def body() -> int:
        # Before any other thread begins, so that none of them ever gets one (serve/host.py waits for them).
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            args, rest = build_parser().parse_known_args(argv)
            os.environ.setdefault("GLOG_v", "3")             # of MindSpore's messages, errors only
            _log_to_stderr()
            return run(args, rest)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return run_command(body)
