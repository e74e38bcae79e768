"""Bounds of the agent, each with its reason."""

from typing import Final

from prism_common.limits import MIB

#: More starts at once only make each of them slower; a start is mostly system time.
STARTS_MAX_DEFAULT: Final = 8
#: What one exec's output may take on the node's disk; older output gives way.
RING_BYTES: Final = 16 * MIB
#: One read of output, and so one message to a client.
READ_BYTES: Final = 1 * MIB
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
#: Between two messages of reports, since one costs as much as many reports in it: where few come,
#: and where many do.
REPORT_LINGER_S: Final = 0.01
REPORT_LINGER_MAX_S: Final = 0.04
#: What is only on its way to another state is said when it stays in it for so long. Where hundreds
#: start together each takes about a tenth of a second, and would be told of twice.
REPORT_PASSING_S: Final = 0.25
#: Between two attempts to have the disk keep what was written.
SYNC_RETRY_S: Final = 1.0
#: A sandbox whose lease no agent has extended ends by itself so long after the agent would have
#: ended it. The leader waits for a tenth of the lease and 2 s more before it runs elsewhere.
LEASE_GRACE_S: Final = 1.0
#: Requests that wait for a supervisor to read them. So many wait only for one that is frozen, or
#: that whoever has taken over its sandbox's own kernel has ask for answers and read none.
SUPERVISOR_UNSENT_MAX: Final = 4096
#: Messages of a supervisor that are taken, in a second and at once, and some more for each exec
#: that is started. Output needs fewer: each read takes all that there is. Whoever has taken over a
#: sandbox's own kernel would else keep the loop busy.
SUPERVISOR_SAYS_PER_S: Final = 500
SUPERVISOR_SAYS_MAX: Final = 4096
SUPERVISOR_SAYS_AN_EXEC: Final = 6
#: One that has said more is not listened to for so long.
SUPERVISOR_PAUSE_S: Final = 0.02
#: Between two attempts to reach a supervisor whose connection broke.
RECONNECT_S: Final = 0.05
#: File calls under way in one sandbox; each has a thread of its own.
FILE_CALLS_MAX: Final = 32
#: The same of all sandboxes of the node.
FILE_CALLS_NODE_MAX: Final = 128
#: Connections to ports of one sandbox.
FORWARDS_MAX: Final = 256
#: The same of all sandboxes of the node; each may hold some 500 KiB of what was not taken yet.
FORWARDS_NODE_MAX: Final = 1024
#: Of what a sandbox has sent, held for one connection; the kernel holds the rest.
FORWARD_BYTES: Final = 128 * 1024
#: On loopback a connection is made at once, unless the listener's queue is full.
FORWARD_CONNECT_S: Final = 5.0
#: A listing is one message, and a message is at most 4 MiB.
LIST_ENTRIES_MAX: Final = 10_000
LIST_BYTES_MAX: Final = 3 * MIB
#: Parts of a path: making each of them resolves all before it.
PATH_PARTS_MAX: Final = 256
#: Removing holds two descriptors for each level.
REMOVE_DEPTH_MAX: Final = 128
#: Time for file calls to let go of a sandbox that ends; a step of one is at most 1 MiB.
FILE_CALLS_END_S: Final = 5.0
