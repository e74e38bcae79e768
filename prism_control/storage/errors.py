"""What can go wrong with the disk. Everything but a full disk stops the member."""

from prism_common.errors import StartupError


class StorageError(Exception):
    """A write or its fsync failed: what is on disk is unknown, so the member must stop."""


class DiskFullError(Exception):
    """Nothing of the write happened; it may be tried again when there is room."""


class CorruptStoreError(StartupError):
    """What was read is not what was written."""

    reason = "CORRUPT_STORE"
