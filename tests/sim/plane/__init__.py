"""The whole control plane in one process on virtual time: not only the core, but what drives it.

The real driver, batcher, leadership, scheduler, dispatcher and state machine of each member, and
the real session, report queue and reconciler of each agent, run on an event loop whose time is
made up.
Disks, the network and the sandboxes' processes are simulated. One seed decides everything.
"""
