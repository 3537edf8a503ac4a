"""Runs one Python program in namespaces of its own; started by `full_python.py` as `python -I -S jail.py JSON`.

Three processes: this one makes the namespaces, its child is their process 1, whose end kills all others inside, and
the grandchild becomes the program. `unshare` and `pivot_root` come from libc through ctypes: Python 3.11 has neither,
no Python has `mount`, and util-linux's commands, which some containers lack, would need a shell between them.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

NAMESPACES = 0x20000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000  # mount, uts, ipc, pid, net
NEW_USER = 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 0x2, -100, 0x8000
MOUNT_SETATTR, READ_ONLY_NOSUID = 442, 0x1 | 0x2  # the system call's number is the same on every architecture
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
NOBODY, INSIDE = 65534, 1000  # user ids: root's after the setup; other users' inside the namespace
MAX_PROCESSES, MAX_FILES, MAX_FILE_BYTES = 8, 64, 16 * 2**20
MAX_DISK = "size=32m,nr_inodes=4096,mode=755"
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache")
HOME = "/private"  # inside: the program's own folder, the only one it can write to
DEVICES = ("/dev/null", "/dev/urandom")
# Refused inside, by number on x86-64 and on aarch64. Sockets: network namespaces do not cover every family (vsock).
REFUSED = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "setns": (308, 268),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    status = settings["status"]
    os.set_inheritable(status, False)
    os.umask(0o022)
    source = sys.stdin.buffer.read()
    try:
        signal.alarm(settings["seconds"] + 2)  # even if the caller has died
        enter_namespaces()
        build_root(settings["root"], settings["prefix"], source)
        drop_privileges()
        first = os.fork()
    except OSError as error:
        os.write(status, json.dumps({"refused": f"{error.strerror}: {error.filename}"}).encode())
        return
    if first:
        os.waitpid(first, 0)
    else:
        run_as_init(lambda: exec_program(settings), status)


def call(name: str, *arguments: Any) -> None:
    """Call libc's function; raises OSError with its name."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def enter_namespaces() -> None:
    """Root needs no user namespace to mount, and gets one later; without one, its files could not be bound."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NAMESPACES if user == 0 else NAMESPACES | NEW_USER)
    if user:
        write("/proc/self/setgroups", b"deny")
        write("/proc/self/uid_map", f"{INSIDE} {user} 1".encode())
        write("/proc/self/gid_map", f"{INSIDE} {group} 1".encode())


def build_root(root: str, prefix: str, source: bytes) -> None:
    """Change to a file system that holds the interpreter and the system's libraries, read-only, and the program."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, MAX_DISK.encode())
    for path in (*LIBRARIES, prefix):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            bind(path, root + path, READ_ONLY_NOSUID)
    for path in DEVICES:
        bind(path, root + path, 0)
    os.mkdir(root + HOME)
    write(f"{root}{HOME}/program.py", source)
    if os.geteuid() == 0:
        os.chown(root + HOME, NOBODY, NOBODY)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir(HOME)


def bind(path: str, target: str, attributes: int) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write(target, b"")
    call("mount", path.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    if attributes:
        change = struct.pack("4Q", attributes, 0, 0, 0)
        call("syscall", MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, change, len(change))


def drop_privileges() -> None:
    """Root becomes nobody. What is left in our own user namespace is lost when the program is executed."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("unshare", NEW_USER)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def run_as_init(program: Callable[[], NoReturn], status: int) -> NoReturn:
    """Start the program and report how it ends; the processes that it leaves behind end with this one."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    child = os.fork()
    if not child:
        program()
    while True:
        pid, ended = os.wait()  # orphans, too
        if pid == child:
            os.write(status, json.dumps({"code": os.waitstatus_to_exitcode(ended)}).encode())
            os._exit(0)


def exec_program(settings: dict[str, Any]) -> NoReturn:
    try:
        limit(settings["seconds"], settings["memory"])
        refuse_system_calls()
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.execve(settings["python"], [settings["python"], "-I", "-S", "-B", "program.py"], {})
    except BaseException as error:
        os.write(settings["status"], json.dumps({"refused": repr(error)}).encode())
    os._exit(1)


def limit(seconds: int, memory: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds + 1,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_NPROC: MAX_PROCESSES,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def refuse_system_calls() -> None:
    """Make REFUSED fail with EPERM (seccomp), and kill on system calls of another architecture."""
    column, architecture = ARCHITECTURES[platform.machine()]
    numbers = [each[column] for each in REFUSED.values()]
    load, equal, at_least, ret = 0x20, 0x15, 0x35, 0x06
    filters = [(load, 0, 0, 4), (equal, 1, 0, architecture), (ret, 0, 0, 0x80000000), (load, 0, 0, 0)]
    filters += [(at_least, len(numbers) + 1, 0, 0x40000000)]  # x32, a second table of the same calls
    filters += [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    filters += [(ret, 0, 0, 0x7FFF0000), (ret, 0, 0, 0x00050001)]
    install(filters)


def install(filters: Sequence[tuple[int, int, int, int]]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in filters))
    program = struct.pack("HP", len(filters), ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, 2, program, 0, 0)


def write(path: str, data: bytes) -> None:
    with contextlib.closing(open(path, "wb")) as file:
        file.write(data)


if __name__ == "__main__":
    main()
