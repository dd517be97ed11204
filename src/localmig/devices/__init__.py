"""The guest side: devices a VMM attaches to over vhost-user.

Owns:        one folder a device type.
Never sees:  how a handover is run; a device is only told what to save, adopt, stop and resume.
Read next:   virtio_net/.
"""
