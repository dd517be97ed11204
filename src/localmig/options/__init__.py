"""Options: command line text, a file's text and mappings from another daemon become frozen specs.

Owns:        what can be asked for: objects with their options, addresses, who may ask.
Never sees:  the machine: no file is opened, no name looked up, nothing is tried. Which types of objects there are.
Read next:   specs.py for objects, address.py for where migrations go.
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
    MonitorSpec,
    RunAsSpec,
    SandboxSpec,
    parse_monitor,
    parse_users,
    read_runas,
    read_sandbox,
)
from localmig.options.specs import KINDS, DeviceSpec, NetdevSpec, Spec, differences, to_mapping
from localmig.options.together import check_together, reasons_to_stay_home

__all__ = [
    "CONFIG_BYTES_MAX",
    "KINDS",
    "AccessSpec",
    "Address",
    "Config",
    "Defer",
    "DeviceSpec",
    "FdAddress",
    "IncomingSpec",
    "MonitorSpec",
    "NetdevSpec",
    "RunAsSpec",
    "SandboxSpec",
    "Spec",
    "TcpAddress",
    "UnixAddress",
    "check_together",
    "differences",
    "parse_address",
    "parse_config",
    "parse_incoming",
    "parse_monitor",
    "parse_users",
    "read_runas",
    "read_sandbox",
    "reasons_to_stay_home",
    "to_mapping",
]
