"""Options: command line text, a file's text and mappings from another daemon become frozen specs.

Owns:        what can be asked for: objects with their options, addresses, who may ask.
Never sees:  the machine: no file is opened, no name looked up, nothing is tried.
Read next:   specs.py for the tables, address.py for where migrations go.
"""

from localmig.options.address import (
    Address,
    Defer,
    FdAddress,
    IncomingSpec,
    TcpAddress,
    UnixAddress,
    parse_address,
    parse_incoming,
)
from localmig.options.config import CONFIG_BYTES_MAX, Config, parse_config
from localmig.options.process import (
    AccessSpec,
    RunAsSpec,
    SandboxSpec,
    parse_users,
    read_runas,
    read_sandbox,
)
from localmig.options.specs import (
    AnySpec,
    DeviceSpec,
    MonitorSpec,
    NetdevSpec,
    StreamSpec,
    TapSpec,
    VirtioNetSpec,
    check_together,
    differences,
    from_mapping,
    help_for,
    parse_device,
    parse_monitor,
    parse_netdev,
    to_mapping,
)

__all__ = [
    "CONFIG_BYTES_MAX",
    "AccessSpec",
    "Address",
    "AnySpec",
    "Config",
    "Defer",
    "DeviceSpec",
    "FdAddress",
    "IncomingSpec",
    "MonitorSpec",
    "NetdevSpec",
    "RunAsSpec",
    "SandboxSpec",
    "StreamSpec",
    "TapSpec",
    "TcpAddress",
    "UnixAddress",
    "VirtioNetSpec",
    "check_together",
    "differences",
    "from_mapping",
    "help_for",
    "parse_address",
    "parse_config",
    "parse_device",
    "parse_incoming",
    "parse_monitor",
    "parse_netdev",
    "parse_users",
    "read_runas",
    "read_sandbox",
    "to_mapping",
]
