"""A server whose model is a script, as a process: VOCABULARY [fault]. Prints its port. With `fault` the engine fails
once an answer grows."""
import signal
import sys
import threading
import time

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

from serve_fixtures import Served

from research.telechat.serve.host import Host, Times, Web, listen
from research.telechat.text.vocab import Vocab


def main():
    served = Served(Vocab.load(sys.argv[1]), context=100_000, pause=0.005)
    served.answer = "好" * 90_000
    listener = listen("127.0.0.1", 0)
    times = Times(grace=0.5)

    def fail():
        while not served.scheduler.stats().generated_tokens:
            time.sleep(0.01)
        served.scheduler.fault = RuntimeError("the card is on fire")

    def ready():
        print(listener.getsockname()[1], flush=True)
        if sys.argv[2:] == ["fault"]:
            threading.Thread(target=fail, daemon=True).start()
    return Host(served.service, Web(served.app, listener, times), times).run(lambda: served.engine, ready)


if __name__ == "__main__":
    sys.exit(main())
