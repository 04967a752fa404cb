"""Wrong keys are answered more and more slowly, for each address; a right key never waits."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from server.errors import TooManyWrongKeys

FREE, MAX_DELAY, MAX_ADDRESSES = 10, 5.0, 4096
"""Wrong keys of an address that are answered at once, the longest delay of an answer in seconds, and addresses kept."""
_IPV6_NETWORK_BITS = 64


class WrongKeys:
    """One time per address (a /64 network of IPv6): when its wrong keys so far would be through at one per second.

    The table is bounded; the address that was seen longest ago is forgotten first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._through: OrderedDict[str, float] = OrderedDict()

    def delay(self, address: str) -> float:
        """Count a wrong key; returns the seconds to wait before it is answered. Raises ``TooManyWrongKeys``."""
        network, now = _network(address), self._clock()
        through = max(self._through.get(network, now), now) + 1.0
        delay = through - now - FREE
        if delay > MAX_DELAY:
            raise TooManyWrongKeys(retry_after=delay)
        self._through[network] = through
        self._through.move_to_end(network)
        if len(self._through) > MAX_ADDRESSES:
            self._through.popitem(last=False)
        return max(delay, 0.0)


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped is not None:  # of a client that uses IPv4, where the server listens on "::"
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), _IPV6_NETWORK_BITS), strict=False))
