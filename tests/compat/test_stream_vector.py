"""Streams saved by releases are still written and still read: the format's promise."""

from __future__ import annotations

from tests.compat import synthetic
from tests.compat.vmdesc_reader import find_vmdesc, walk

from localmig.migration.stream import IncomingStream
from localmig.vmstate import close_descriptors


def test_today_writes_the_bytes_of_the_vector() -> None:
    with synthetic.written_stream() as (_, pieces):
        assert pieces == synthetic.read_vector(synthetic.VECTOR)


def test_today_reads_the_vector() -> None:
    pieces = synthetic.read_vector(synthetic.VECTOR)
    offsets = walk(b"".join(pieces)).descriptors
    assert len(offsets) == synthetic.DESCRIPTOR_COUNT
    stream = IncomingStream(
        setup={synthetic.SETUP_NAME: synthetic.NIC}, switchover={synthetic.RINGS_NAME: synthetic.NIC_RINGS}
    )
    with synthetic.open_descriptors(synthetic.DESCRIPTOR_COUNT) as fds:
        stream.description(pieces.description)
        (nic,) = stream.setup(pieces.setup, zip(offsets, fds, strict=True))
        (rings,) = stream.switchover(pieces.switchover)
        assert nic.state == synthetic.setup_state(fds)
        assert rings.state == synthetic.rings_section().state
        close_descriptors(nic.description, nic.state)
        assert not any(fd.is_open for fd in fds)


def test_the_vector_explains_itself() -> None:
    sections = walk(b"".join(synthetic.read_vector(synthetic.VECTOR))).sections
    assert sections["configuration"] == {"machine.size": 8, "machine": b"localmig"}
    nic = sections["nic0/synthetic-nic"]
    assert nic["features"] == 0x1_3000_8028
    assert nic["mac"] == bytes.fromhex("525400123456")
    assert [region["guest_address"] for region in nic["regions"]] == [0, 1 << 32]
    assert [queue["label"].decode() for queue in nic["queues"]] == ["rx", "tx ✓"]
    assert [queue["kick.present"] for queue in nic["queues"]] == [True, False]
    assert nic["link"] == {"speed": 10_000, "is_up": True}
    assert nic["vlans"] == [1, 5, 4094]
    assert nic["mtu"] == 9000
    assert nic["synthetic-nic/announce"]["announces_left"] == 3
    rings = sections["nic0/synthetic-nic-rings"]
    assert rings["rings"] == [
        {"next_avail": 0x1234, "used_wrap": False},
        {"next_avail": 5, "used_wrap": True},
    ]
    assert rings["tx_packets"] == 77


def test_the_vmdesc_has_what_analyze_migration_insists_on() -> None:
    vmdesc = find_vmdesc(b"".join(synthetic.read_vector(synthetic.VECTOR)))
    assert vmdesc["page_size"] == 4096
    assert [device["name"] for device in vmdesc["devices"]] == [synthetic.SETUP_NAME, synthetic.RINGS_NAME]
    assert all(len(device["name"]) < 128 for device in vmdesc["devices"])
