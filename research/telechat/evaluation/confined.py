"""A script that evaluation/sandbox.py starts: sets up isolation, then runs one untrusted Python program in it.

    python -I -S -B confined.py ORDER < TOKEN_AND_PROGRAM        prints one line of JSON, see `main`

Linux only, standard library only; nothing of the plugin is imported. Two processes: the guard, which waits and kills,
and its child, the first process of a new PID namespace, which becomes the program. The child sees its own file system:
the interpreter and the system's libraries, read-only, and an empty folder. It has no network, no privileges, and
the limits of ORDER. If any of this cannot be set up, that is an error and the program does not run.
"""
import contextlib
import ctypes
import json
import os
import platform
import re
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/seccomp.h>, <linux/audit.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEW_ANY = 0x20000000, 0x40000000, 0x7E020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MS_RELATIME, ST_RELATIME, MNT_DETACH = 1 << 21, 4096, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
BOX = "/box"                     # the program's folder
INNER_ID = 1000                  # user in the namespace; any but root, whose capabilities would survive the exec

# System calls that programs do not need, by number: more namespaces, mounts, tracing, kernel memory that no limit
# covers (shmget, memfd_create, keys), and kernel interfaces with a history of exploits.
_SAME = {"io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
         "fspick": 433, "mount_setattr": 442, "memfd_secret": 447}
REFUSED = {
    "x86_64": {**_SAME, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
               "ptrace": 101, "bpf": 321, "keyctl": 250, "add_key": 248, "request_key": 249, "perf_event_open": 298,
               "userfaultfd": 323, "memfd_create": 319, "shmget": 29, "msgget": 68, "semget": 64, "mknod": 133,
               "mknodat": 259, "process_vm_readv": 310, "process_vm_writev": 311, "open_by_handle_at": 304},
    "aarch64": {**_SAME, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
                "ptrace": 117, "bpf": 280, "keyctl": 219, "add_key": 217, "request_key": 218, "perf_event_open": 241,
                "userfaultfd": 282, "memfd_create": 279, "shmget": 194, "msgget": 186, "semget": 190, "mknodat": 33,
                "process_vm_readv": 270, "process_vm_writev": 271, "open_by_handle_at": 265}}
CALLS = {"x86_64": {"arch": 0xC000003E, "clone": 56, "socket": 41}, "aarch64": {"arch": 0xC00000B7, "clone": 220,
                                                                                "socket": 198}}
CLONE3, ENOSYS, EPERM, AF_UNIX = 435, 38, 1, 1

# What runs in isolation. It reports "passed" by repeating the token, which a program that merely exits does not.
RUNNER = """
import os, sys
token = sys.stdin.buffer.readline().strip()
program = sys.stdin.buffer.read()
report = os.dup(3)
os.close(3)
nothing = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(nothing, number)
sys.stdin = open(os.devnull)
try:
    exec(compile(program.decode(), "program", "exec"), {})
except BaseException as error:
    os.write(report, ("failed: " + type(error).__name__ + ": " + str(error)[:200]).encode("utf-8", "replace"))
    os._exit(1)
os.write(report, token)
os._exit(0)
"""

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The isolation cannot be set up."""


def call(name: str, *args: object) -> None:
    """Call a function of the C library that returns 0 on success. Raises Refused."""
    encoded = [arg.encode() if isinstance(arg, str) else arg for arg in args]
    if getattr(libc, name)(*(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in encoded)) != 0:
        raise Refused(f"{name}({', '.join(map(str, args))}): {os.strerror(ctypes.get_errno())}")


def become_isolated() -> Optional[int]:
    """Enter new namespaces. Returns the user id to change to if this process is root; None in a user namespace."""
    kinds = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if os.geteuid() == 0:
        # Root is exempt from the limit on processes, so the program gets its own user.
        call("unshare", kinds)
        return 60000 + os.getpid() % 5000
    user, group = os.geteuid(), os.getegid()
    call("unshare", kinds | CLONE_NEWUSER)
    try:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{INNER_ID} {user} 1"),
                           ("gid_map", f"{INNER_ID} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(line)
    except OSError as err:
        raise Refused(f"a namespace of users: {err}") from err
    return None


def build_root(root: str, paths: Sequence[str], size: int) -> None:
    """Replace the file system by one built in the empty folder `root`: `paths`, read-only, and an empty folder BOX of
    `size` bytes."""
    os.umask(0o022)                                        # the program's user must get through the folders made here
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in paths:
        bind(path, root)
    os.mkdir(root + BOX)
    if not os.path.lexists(root + "/tmp"):                 # the interpreter may be there
        os.symlink(BOX, root + "/tmp")
    call("mount", "tmpfs", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=1777")
    call("mount", "none", root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
    os.chdir(root)
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir(BOX)


def bind(path: str, root: str) -> None:
    """Bind-mount `path` under `root`, read-only; a link stays a link."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path) and not os.path.lexists(target):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        with open(target, "a", encoding="ascii"):
            pass
    call("mount", path, target, None, MS_BIND | MS_REC, None)
    for place in [target, *mounts_below(target)]:          # a remount changes one mount, and none below it
        try:
            flags = os.statvfs(place).f_flag               # those that a user namespace may not remove
        except (FileNotFoundError, NotADirectoryError):
            continue                                       # hidden by a mount above it: no path leads there
        kept = flags & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048) | (MS_RELATIME if flags & ST_RELATIME else 0)
        call("mount", "none", place, None, MS_BIND | MS_REMOUNT | MS_RDONLY | kept, None)


def mounts_below(path: str) -> List[str]:
    """Mount points below `path`, from field 5 of /proc/self/mountinfo (man 5 proc), where blanks are octal."""
    with open("/proc/self/mountinfo", "rb") as file:
        points = [re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4]) for line in file]
    return [point for point in map(os.fsdecode, points) if point.startswith(path + "/")]


def filter_program(machine: str) -> List[Tuple[int, int, int, int]]:
    """The seccomp filter as instructions (code, jump if true, jump if false, operand)."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, missing, kill = 0x7FFF0000, 0x50000 | EPERM, 0x50000 | ENOSYS, 0x80000000
    numbers = CALLS[machine]
    steps = [(load, 0, 0, 4), (equal, 1, 0, numbers["arch"]), (give, 0, 0, kill), (load, 0, 0, 0),
             (at_least, 0, 1, 0x40000000), (give, 0, 0, refuse), (equal, 0, 1, CLONE3), (give, 0, 0, missing)]
    for number in sorted(REFUSED[machine].values()):
        steps += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    steps += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16), (any_bit, 0, 4, CLONE_NEW_ANY), (give, 0, 0, refuse),
              (equal, 0, 2, numbers["socket"]), (load, 0, 0, 16), (equal, 0, 1, AF_UNIX), (give, 0, 0, allow),
              (give, 0, 0, refuse)]
    return steps


def refuse_calls() -> None:
    """Set no_new_privs and install the seccomp filter."""
    steps = [struct.pack("HBBI", *step) for step in filter_program(platform.machine())]
    code = ctypes.create_string_buffer(b"".join(steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)


def limit(order: Dict[str, Any]) -> None:
    """Set the limits of a process, and on the number of processes."""
    memory, size = order["memory"], order["file_size"]
    for kind, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, order["cpu_seconds"]),
                        (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_NOFILE, order["files"]),
                        (resource.RLIMIT_NPROC, order["processes"]), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_MSGQUEUE, 0), (resource.RLIMIT_MEMLOCK, 0)):
        resource.setrlimit(kind, (value, value))


def become_program(order: Dict[str, Any], user: Optional[int], report: int, failure: int) -> None:
    """The child: set up the isolation, then exec the interpreter. Writes to `failure` what could not be set up."""
    try:
        os.setsid()
        build_root(order["root"], order["paths"], order["folder_size"])
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.dup2(report, 3)
        environment = {"PATH": "/usr/bin:/bin", "HOME": BOX, "TMPDIR": BOX, "LANG": "C.UTF-8",
                       "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        if order["libraries"]:
            environment["LD_LIBRARY_PATH"] = order["libraries"]
        limit(order)
        refuse_calls()
        os.execve(order["python"], [order["python"], "-I", "-B", "-c", RUNNER], environment)
    except (Refused, OSError, ValueError, KeyError) as err:
        os.write(failure, str(err).encode("utf-8", "replace")[:500])
    finally:
        os._exit(2)


def ended_by_limit(child: int) -> bool:
    """Whether a program that reported nothing was killed by the limit on its processor time."""
    for _ in range(100):                                   # it has closed its report and is about to exit
        # WNOWAIT: its number must not become another process's before `main` kills it.
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return (ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                    and ended.si_status in (signal.SIGXCPU, signal.SIGKILL))
        time.sleep(0.01)
    return False


def wait(report: int, seconds: float) -> Optional[bytes]:
    """What the program reports before it ends, its first kilobyte; None: it did not end in time."""
    end, found = time.monotonic() + seconds, b""
    while True:
        if not select.select([report], [], [], max(end - time.monotonic(), 0))[0]:
            return None
        read = os.read(report, 1024)
        if not read or len(found) > 1024:
            return found
        found += read


def main() -> Dict[str, str]:
    """{"result": "passed" | "failed: ..." | "timed out"}, or {"refused": why the program did not run}."""
    order = json.loads(sys.argv[1])
    if platform.machine() not in CALLS:
        raise Refused(f"no list of system calls for {platform.machine()}")
    user = become_isolated()
    report, report_end = os.pipe()
    failure, failure_end = os.pipe()
    child = os.fork()
    if not child:
        become_program(order, user, report_end, failure_end)
    os.close(report_end)
    os.close(failure_end)
    try:
        refused = os.read(failure, 500)                    # ends when the child becomes the interpreter
        if refused:
            raise Refused(refused.decode("utf-8", "replace"))
        found = wait(report, order["seconds"])
        limited = found == b"" and ended_by_limit(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)                 # with it, all processes of its namespace
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    if found is None or limited:
        return {"result": "timed out"}
    if found == order["token"].encode():
        return {"result": "passed"}
    if found.startswith(b"failed: "):
        return {"result": found.decode("utf-8", "replace")}
    return {"result": "failed: ended before its tests"}


if __name__ == "__main__":
    try:
        outcome = main()
    except (Refused, OSError) as error:
        outcome = {"refused": str(error)}
    print(json.dumps(outcome))
