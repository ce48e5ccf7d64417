"""What `prepared.put_python` writes into a program `python`: `prepared_python.py SOCKET PROGRAM SCRIPT ARGUMENTS...`.

Starts with little more than the interpreter, hands its standard streams to the child that runs the script, passes
signals on, and ends as the child does. Not a test itself.
"""
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Ask, wait, end."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    job = {"program": sys.argv[2], "args": sys.argv[3:], "cwd": os.getcwd(), "env": dict(os.environ), "limit": 0,
           "cores": sorted(os.sched_getaffinity(0))}
    socket.send_fds(connection, [(json.dumps(job) + "\n").encode()], [0, 1, 2])
    lines = connection.makefile("r")
    child = int(lines.readline())
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = int(lines.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
