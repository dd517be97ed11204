"""The test kit: what it takes to stand on the guest's side of a localmig daemon, and around it.

Owns:        a vhost-user frontend with a virtio-net driver, namespaces, traffic, a hostile proxy.
Never sees:  the inside of the daemon: it talks to sockets and programs, as a VMM and an operator do.
Read next:   frontend.py for the VMM's part, guest.py for a whole guest, localmig/demo for everything together.
"""
