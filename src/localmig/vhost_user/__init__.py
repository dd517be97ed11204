"""vhost-user, the backend side: messages, the session protocol, guest memory, the socket driver.

Read in this order: message.py (bytes), protocol.py (what they mean), memory.py (where guest memory is), session.py
(the only file here that touches a socket).
"""
