"""Inside the sandbox: refuse system calls that no test needs, then become the program.

The sandbox copies this file and runs it as `python -I -S FILE PROGRAM ARGUMENT ...`, so it imports
nothing of rayfuse. Without libseccomp the program runs without the filter.
"""

import ctypes
import errno
import os
import signal
import sys
from typing import Any

ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # of seccomp.h
MASKED_EQUAL = 7

REFUSED = (
    *("mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "unshare", "setns", "ptrace", "process_vm_readv"),
    *("process_vm_writev", "kcmp", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key"),
    *("request_key", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("open_by_handle_at", "name_to_handle_at", "kexec_load", "kexec_file_load", "init_module"),
    *("finit_module", "delete_module", "swapon", "swapoff", "reboot", "syslog", "acct", "quotactl"),
    *("fanotify_init", "vmsplice", "personality"),
)
"""Ways to other namespaces, processes and parts of the kernel that only the system's tools need."""

NEW_NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000)
"""Flags of clone: mount, cgroup, UTS, IPC, user and process namespaces."""
NEW_NETWORK = 0x40000000


class Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`: an argument of a system call and its value below a mask."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


def refuse_calls(library: Any) -> None:
    """Make the calls fail with EPERM in this process and all that it starts.

    Raises:
        OSError: The kernel refuses the filter.
    """
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ALLOW)))

    def refuse(name: str, number: int, *comparisons: Comparison) -> None:
        call = library.seccomp_syscall_resolve_name(name.encode())
        if call == -1:  # a call that this version does not know
            return
        several = (Comparison * len(comparisons))(*comparisons)
        action = ctypes.c_uint32(ERRNO | number)
        code = library.seccomp_rule_add_array(context, action, call, len(comparisons), several)
        if code and code != -errno.EDOM:  # not a call of this architecture
            raise OSError(-code, f"seccomp: {os.strerror(-code)}", name)

    for name in REFUSED:
        refuse(name, errno.EPERM)
    for flag in (*NEW_NAMESPACES, NEW_NETWORK):
        refuse("clone", errno.EPERM, Comparison(0, MASKED_EQUAL, flag, flag))
    refuse("clone3", errno.ENOSYS)  # its flags are in memory, out of a filter's sight: use clone
    code = library.seccomp_load(context)
    if code:
        raise OSError(-code, f"seccomp: {os.strerror(-code)}")


def main() -> None:
    """Load the filter where libseccomp is installed, and become the program of the arguments."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        library = None
    if library is not None:
        refuse_calls(library)
    # The program would inherit what this process ignores: by Python, or by whatever started it.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
