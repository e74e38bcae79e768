"""Every bound that both planes share, with its reason."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

#: A create is a few hundred bytes; its env may be 64 KiB; no honest call comes near this.
MESSAGE_BYTES_MAX: Final = 4 * MIB
#: What one chunk of stdin, output, a file or a snapshot carries: large enough that framing is
#: cheap, small enough that one stream does not delay the others.
CHUNK_BYTES_MAX: Final = 1 * MIB
#: A frame of HTTP/2. With the usual 16 KiB a gigabyte costs twice the processor time; one of this
#: size holds up the other streams of a connection of 1 Gbit/s for 2 ms.
FRAME_BYTES_MAX: Final = 256 * KIB
#: RFC 1123 label: a sandbox's name is its host name.
NAME_LENGTH_MAX: Final = 63
#: Kept in the replicated state for 24 h each.
REQUEST_ID_LENGTH_MAX: Final = 128
LABELS_MAX: Final = 64
#: execve takes 128 KiB a string; two such would not be one environment any more.
ENV_BYTES_MAX: Final = 64 * KIB
ENV_ENTRIES_MAX: Final = 256
ARGV_BYTES_MAX: Final = 128 * KIB
ARGV_ENTRIES_MAX: Final = 1024
PATH_LENGTH_MAX: Final = 4096

PAGE_SIZE_DEFAULT: Final = 50
PAGE_SIZE_MAX: Final = 1000
BATCH_ITEMS_MAX: Final = 1000

#: Calls of one connection under way: a burst of ten thousand, and it leaves others room in the
#: create queue of 12,000.
CALLS_PER_CLIENT_MAX: Final = 10_240
#: Of all connections; a waiting call takes about 20 KiB.
CALLS_MAX: Final = 40_960
CALL_BYTES_PER_CLIENT_MAX: Final = 64 * MIB
CALL_BYTES_MAX: Final = 256 * MIB

CPU_MILLICORES_DEFAULT: Final = 500
CPU_MILLICORES_MAX: Final = 256_000
MEMORY_BYTES_DEFAULT: Final = 256 * MIB
MEMORY_BYTES_MIN: Final = 16 * MIB
MEMORY_BYTES_MAX: Final = 4096 * GIB
DISK_BYTES_DEFAULT: Final = 256 * MIB
DISK_BYTES_MIN: Final = 1 * MIB
DISK_BYTES_MAX: Final = 4096 * GIB
PROCESSES_DEFAULT: Final = 128
PROCESSES_MAX: Final = 32_768
OPEN_FILES_DEFAULT: Final = 1024
OPEN_FILES_MAX: Final = 1_048_576
OUTPUT_BYTES_PER_SECOND_MIN: Final = 1024
OUTPUT_BYTES_PER_SECOND_MAX: Final = 16 * GIB
TTL_S_MAX: Final = 366 * 24 * 3600
GRACE_S_DEFAULT: Final = 5.0
GRACE_S_MAX: Final = 300.0
PRIORITY_MAX: Final = 1000

#: An idle gRPC connection is probed at this interval, so that a dead peer is noticed.
KEEPALIVE_S: Final = 10
#: A connection that cannot be made in this time counts as refused.
CONNECT_TIMEOUT_S: Final = 2.0
#: A reconnect waits between these two, doubling, so that a restarted peer is found soon and a
#: missing one is not hammered.
RECONNECT_MIN_S: Final = 0.1
RECONNECT_MAX_S: Final = 2.0
