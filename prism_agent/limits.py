"""Bounds of the agent, each with its reason."""

from typing import Final

from prism_common.limits import MIB

#: More starts at once only make each of them slower; a start is mostly system time.
STARTS_MAX_DEFAULT: Final = 8
#: What one exec's output may take on the node's disk; older output gives way.
RING_BYTES: Final = 16 * MIB
#: One read of output, and so one message to a client.
READ_BYTES: Final = 256 * 1024
#: Execs that run at once in a sandbox. The supervisor's table has this size too.
EXECS_RUNNING_MAX: Final = 256
#: Ended execs whose output is kept; the oldest give way.
EXECS_KEPT_MAX: Final = 256
#: What ended execs of one sandbox may keep on the node's disk together.
EXECS_BYTES_MAX: Final = 64 * MIB
#: Request ids remembered in a sandbox: a repeat of one of them attaches and never runs again.
REQUESTS_KEPT_MAX: Final = 4096
#: Time in which a supervisor answers; it does nothing that takes long.
SUPERVISOR_TIMEOUT_S: Final = 5.0
#: Time from the start of a sandbox's first process to an answering supervisor.
START_TIMEOUT_S: Final = 20.0
#: After a restart, clients have this time to attach again before an exec may overwrite output.
ATTACH_GRACE_S: Final = 10.0
#: Between two attempts to delete what could not be deleted.
DELETE_RETRY_S: Final = 1.0
#: Reports in one message, as the protocol says.
REPORTS_MAX: Final = 1000
#: Between two attempts to reach a supervisor whose connection broke.
RECONNECT_S: Final = 0.05
#: File calls under way in one sandbox; each has a thread of its own.
FILE_CALLS_MAX: Final = 32
#: The same of all sandboxes of the node.
FILE_CALLS_NODE_MAX: Final = 128
#: A listing is one message, and a message is at most 4 MiB.
LIST_ENTRIES_MAX: Final = 10_000
LIST_BYTES_MAX: Final = 3 * MIB
#: Parts of a path: making each of them resolves all before it.
PATH_PARTS_MAX: Final = 256
#: Removing holds two descriptors for each level.
REMOVE_DEPTH_MAX: Final = 128
#: Time for file calls to let go of a sandbox that ends; a step of one is at most 1 MiB.
FILE_CALLS_END_S: Final = 5.0
