"""Which addresses are public: those that everybody can reach, so that a server gives nothing away by visiting them."""

from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network

UNICAST = IPv6Network("2000::/3")
"""All public addresses of IPv6. Forms of IPv4's addresses, mapped or translated, are outside of it or in `SPECIAL`."""
SPECIAL = [
    ip_network("168.63.129.16/32"),  # services of Azure to its machines
    ip_network("192.0.0.0/24"),  # set aside by the IETF; among them services of Oracle's cloud
    ip_network("192.88.99.0/24"),  # relays of 6to4
    ip_network("2001::/23"),  # Teredo, and what else the IETF has set aside
    ip_network("2002::/16"),  # 6to4, which has IPv4's addresses inside
    ip_network("3fff::/20"),  # documentation
]
"""Addresses that some versions of Python take to be public."""


def is_public(text: str) -> bool:
    """Whether an address is public."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and (address.scope_id is not None or address not in UNICAST):
        return False
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address in network for network in SPECIAL)
