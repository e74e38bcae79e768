"""What can go wrong with the disk. Everything but a full disk stops the member."""

from prism_common.errors import StartupError


class StorageError(Exception):
    """A write or its fsync failed: what is on disk is unknown, so the member must stop."""


class DiskFullError(Exception):
    """Nothing of the write happened; it may be tried again when there is room."""

    def __init__(self) -> None:
        super().__init__("no space left on the disk that holds --data-dir")


class CorruptStoreError(StartupError):
    """What was read is not what was written."""

    reason = "CORRUPT_STORE"
