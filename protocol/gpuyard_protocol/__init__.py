"""What crosses a process boundary in a yard: quantities, names, messages, subjects, and the bus that carries them.

Imports neither the daemon, the agents nor the client; all of them import it.
"""

#: Version of every message (`v`). A daemon understands this one and its neighbours.
PROTOCOL_VERSION = 1
