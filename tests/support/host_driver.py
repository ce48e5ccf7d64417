"""A server whose model is a script, as a process: VOCABULARY [fault | lost | word]. Prints its port. Once an answer
grows: with `fault` the engine fails, with `lost` it waits for another rank, which dies, with `word` that rank wants to
end."""
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Listener

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

from serve_fixtures import Served

from research.telechat.generation.ranks import DRAIN, Follower, Leader
from research.telechat.serve.host import Host, Times, Web, listen
from research.telechat.text.vocab import Vocab


def other_rank(address, word):
    """A process that connects; it ends, or says that it wants to, when it reads a line."""
    begin, end = os.pipe()
    if os.fork():
        return end
    follower = Follower(address, b"key")
    os.read(begin, 1)
    if word:
        follower.say(DRAIN)
        time.sleep(20)
    os._exit(1)


def main():
    what = sys.argv[2] if sys.argv[2:] else ""
    listener = Listener(("127.0.0.1", 0), authkey=b"key")
    rank = other_rank(listener.address, what == "word") if what in ("lost", "word") else None
    served = Served(Vocab.load(sys.argv[1]), context=100_000, pause=0.005)
    served.answer = "好" * 90_000
    web = listen("127.0.0.1", 0)
    times = Times(grace=0.5)
    host = Host(served.service, Web(served.app, web, times), times)

    def fail():
        while not served.scheduler.stats().generated_tokens:
            time.sleep(0.01)
        if what == "fault":
            served.scheduler.fault = RuntimeError("the card is on fire")
            return
        if what == "lost":
            served.scheduler.gate.clear()
        os.write(rank, b"x")

    def load():
        if rank is not None:
            Leader(listener, 1, on_word=lambda word: host.drain(), on_loss=host.lose)
        return served.engine

    def ready():
        print(web.getsockname()[1], flush=True)
        if what:
            threading.Thread(target=fail, daemon=True).start()
    return host.run(load, ready)


if __name__ == "__main__":
    sys.exit(main())
