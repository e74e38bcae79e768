"""The filters can be built, and say what they are meant to say."""

import struct

import pytest

from prism_agent import seccomp


@pytest.fixture(scope="module")
def filters() -> tuple[bytes, bytes]:
    try:
        return seccomp.build_filters()
    except seccomp.SeccompError as error:
        pytest.skip(str(error))


def test_filters_are_programs_that_the_kernel_takes(filters: tuple[bytes, bytes]) -> None:
    for program in filters:
        assert len(program) % 8 == 0
        assert 0 < len(program) // 8 <= 4096
        # The last instruction of a classic BPF program is a return.
        assert struct.unpack_from("=H", program, len(program) - 8)[0] == 0x06


def test_nothing_is_both_allowed_and_forbidden() -> None:
    assert not set(seccomp.ALLOWED) & set(seccomp.FORBIDDEN)
    assert len(set(seccomp.ALLOWED)) == len(seccomp.ALLOWED)


@pytest.mark.parametrize(
    "call",
    ["mount", "bpf", "keyctl", "io_uring_setup", "userfaultfd", "setns", "unshare", "kexec_load",
     "init_module", "open_by_handle_at", "perf_event_open", "pidfd_getfd", "clone3"],
)  # fmt: skip
def test_dangerous_calls_are_not_allowed(call: str) -> None:
    assert call not in seccomp.ALLOWED
