"""Client channels: one pooled connection per address, never one per request."""

from typing import Final

import grpc
import grpc.aio

from prism_common import limits

#: For every client of ours, synchronous ones too.
CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.http2.max_frame_size", limits.FRAME_BYTES_MAX),
    ("grpc.keepalive_time_ms", limits.KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", int(limits.RECONNECT_MIN_S * 1000)),
    # In spite of its name: how long one attempt to connect may take at least.
    ("grpc.min_reconnect_backoff_ms", int(limits.CONNECT_TIMEOUT_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(limits.RECONNECT_MAX_S * 1000)),
    # Never through the environment's HTTP proxy: peers are dialled directly.
    ("grpc.enable_http_proxy", 0),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """Return a channel to host:port. It connects when it is first used."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class ChannelPool:
    """One channel per address for the life of the process."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """Return the channel to host:port, opening it at first use."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address)
        return channel

    async def close(self) -> None:
        """Close every channel; calls under way are cancelled."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()
