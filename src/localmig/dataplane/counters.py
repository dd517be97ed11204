"""What the packet path counts, by name: the Rust core gives bare numbers, in this order.

Owns:        the names.
Never sees:  where the numbers go.
Read next:   `_dataplane.pyi`; devices/virtio_net/state.py, by which they travel.
"""

from __future__ import annotations

from typing import NamedTuple


class Counters(NamedTuple):
    """What a queue pair did, in the guest's view: rx is TAP to guest. All start at 0 and only grow.

    Attributes:
        rx_packets: frames delivered.
        rx_bytes: their bytes, without the virtio-net header.
        rx_dropped_length: frames that the guest had no room for, or shorter than their header.
        rx_dropped_stale: frames that waited for another driver, or came with an offload that this one did not take.
        rx_dropped_error: frames that the kernel failed to hand over.
        rx_kicks: times the guest told of new receive buffers.
        rx_calls: times the guest was told of frames.
        tx_packets: frames sent.
        tx_bytes: their bytes, without the virtio-net header.
        tx_dropped_interface: frames lost because the interface was down or gone.
        tx_dropped_header: frames whose header or length the kernel refused.
        tx_dropped_memory: frames the kernel had no memory for.
        tx_kicks: times the guest told of frames to send.
        tx_calls: times the guest was told of frames that are sent.
    """

    rx_packets: int = 0
    rx_bytes: int = 0
    rx_dropped_length: int = 0
    rx_dropped_stale: int = 0
    rx_dropped_error: int = 0
    rx_kicks: int = 0
    rx_calls: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    tx_dropped_interface: int = 0
    tx_dropped_header: int = 0
    tx_dropped_memory: int = 0
    tx_kicks: int = 0
    tx_calls: int = 0


class CallbackCounters(NamedTuple):
    """What was done with the chains of one ring that Python answers. All start at 0 and only grow.

    Attributes:
        chains: chains that were completed, or returned unused.
        bytes_read: bytes that the device read; twice those of a chain that it was handed again.
        bytes_written: bytes that the device wrote.
        kicks: times the guest told of new chains.
        calls: times the guest was told of completed ones.
    """

    chains: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    kicks: int = 0
    calls: int = 0


class DriverCounters(NamedTuple):
    """What a driver did: rx is what came from the backend, tx what went to it. Bytes are those of frames.

    Attributes:
        rx_packets: frames received.
        rx_bytes: their bytes, without the virtio-net header.
        rx_dropped: frames that the guest's own TAP did not take.
        tx_packets: frames sent.
        tx_bytes: their bytes, without the virtio-net header.
        tx_dropped: frames longer than the ring.
    """

    rx_packets: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    tx_dropped: int = 0
