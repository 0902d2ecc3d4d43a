"""Time of a collective among the ranks `r, r + stride, ...` of a cluster: ring algorithms with a latency per step.

Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005); bus bandwidth as in
the performance notes of NVIDIA nccl-tests. For `n` ranks of which `k` share a host, over `h` hosts, and `S` bytes:

    lap        = (n - 1)/n × S / bandwidth + (n - h) × latency inside a host + (h - 1) × latency between hosts
    lap        is all_gather or reduce_scatter; all_reduce is both, two laps, or a tree with as many bytes and
               2 (k - 1) steps inside a host and 2 log2(h) between hosts where that is faster (NVIDIA, NCCL 2.4)
    bandwidth, one host    = efficiency × min(device's links, pairwise link × (n - 1))        where the fabric is a mesh
    bandwidth, many hosts  = min(that of the k ranks inside, network efficiency × k × device's share of the network)

A ring enters and leaves a host through the ports of its `k` ranks; the groups beside it use the ports of theirs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log2

from autoparallel.cost.tables import CostTable
from autoparallel.ir.flavor import Flavor


@dataclass(frozen=True, slots=True)
class Spread:
    """How the ranks of a group lie over hosts, for the worst placed group."""

    num_hosts: int
    ranks_per_host: int
    """In the host that holds the fewest of them: its ports are the bottleneck."""


@lru_cache(maxsize=65536)
def worst_spread(
    num_devices: int, devices_per_host: int, group_size: int, stride: int, members: tuple[int, ...] | None = None
) -> Spread:
    """The spread of the group that crosses most hosts: all groups of one stride run together, and the last one counts.

    Groups tile the cluster, as those of a mesh's axis do: blocks of `group_size × stride` consecutive ranks, with
    `stride` groups in each. `members` are the indices of the ranks that take part; without them all do.
    """
    assert group_size * stride <= num_devices, f"{group_size} ranks {stride} apart are more than {num_devices} devices"
    offsets = [index * stride for index in (range(group_size) if members is None else members)]
    if num_devices <= devices_per_host:
        return Spread(num_hosts=1, ranks_per_host=len(offsets))
    if all(after - before >= devices_per_host for before, after in pairwise(offsets)):
        return Spread(num_hosts=len(offsets), ranks_per_host=1)
    worst = Spread(num_hosts=1, ranks_per_host=len(offsets))
    for first in _first_ranks(num_devices, devices_per_host, group_size * stride, stride):
        hosts = Counter((first + offset) // devices_per_host for offset in offsets)
        spread = Spread(num_hosts=len(hosts), ranks_per_host=min(hosts.values()))
        if (spread.num_hosts, -spread.ranks_per_host) > (worst.num_hosts, -worst.ranks_per_host):
            worst = spread
    return worst


def _first_ranks(num_devices: int, devices_per_host: int, span: int, stride: int) -> set[int]:
    """Where in their hosts the first ranks of all groups stand: groups that begin alike lie alike."""
    blocks = range(min(num_devices // span, devices_per_host))
    return {
        (block * span + beside) % devices_per_host
        for block in blocks
        for beside in range(min(stride, devices_per_host))
    }


def distinct_strides(flavor: Flavor, group_size: int) -> list[int]:
    """Of all strides that a mesh's axis of `group_size` may have, the smallest of those that spread groups alike."""
    found: dict[Spread, int] = {}
    for stride in range(1, flavor.num_devices // group_size + 1):
        if flavor.num_devices % (group_size * stride) == 0:
            spread = worst_spread(flavor.num_devices, flavor.devices_per_host, group_size, stride)
            found.setdefault(spread, stride)
    return list(found.values())


@dataclass(frozen=True)
class Topology:
    """The links of a cluster; device `i` sits in host `i // devices_per_host`."""

    flavor: Flavor
    table: CostTable

    def all_gather_s(self, size_bytes: float, *, group_size: int, stride: int = 1) -> float:
        """One lap; `size_bytes` is the gathered tensor."""
        return self._lap_s(size_bytes, group_size, stride)

    def reduce_scatter_s(self, size_bytes: float, *, group_size: int, stride: int = 1) -> float:
        """One lap; `size_bytes` is the tensor before it is scattered."""
        return self._lap_s(size_bytes, group_size, stride)

    def all_reduce_s(
        self, size_bytes: float, members: tuple[int, ...] | None = None, /, *, group_size: int, stride: int = 1
    ) -> float:
        """Two laps, reduce_scatter then all_gather; or a tree, where so many steps would take longer. Among the
        `members` of each group, as in `worst_spread`.
        """
        num_ranks = group_size if members is None else len(members)
        if num_ranks == 1:
            return 0.0
        spread = self.spread(group_size, stride, members)
        return 2 * (self._moving_s(size_bytes, num_ranks, spread) + self._waiting_s(spread, tree=True))

    def send_recv_s(self, size_bytes: float, members: tuple[int, int], /, *, group_size: int, stride: int = 1) -> float:
        """latency + size / bandwidth, from one member of each group to another, for the slowest group. Inside a host a
        single transfer is one copy and reaches the link's bandwidth; between hosts it reaches what collectives do.
        """
        if self.spread(group_size, stride, members).num_hosts > 1:
            network = self.table.network
            return network.latency_s.value + size_bytes / (network.efficiency.value * self._network_bytes_per_s)
        links = self.table.intra_host
        bandwidth = (links.pairwise_bandwidth_bytes_per_s or links.bandwidth_bytes_per_s).value
        return links.latency_s.value + size_bytes / bandwidth

    def _lap_s(self, size_bytes: float, group_size: int, stride: int) -> float:
        """One lap of the ring, as the module's formula."""
        if group_size == 1:
            return 0.0
        spread = self.spread(group_size, stride)
        return self._moving_s(size_bytes, group_size, spread) + self._waiting_s(spread, tree=False)

    def spread(self, group_size: int, stride: int, members: tuple[int, ...] | None = None) -> Spread:
        """Of the worst placed group."""
        return worst_spread(self.flavor.num_devices, self.flavor.devices_per_host, group_size, stride, members)

    def _moving_s(self, size_bytes: float, num_ranks: int, spread: Spread) -> float:
        """Bytes of one lap."""
        assert size_bytes >= 0, size_bytes
        return (num_ranks - 1) / num_ranks * size_bytes / self._ring_bandwidth_bytes_per_s(spread)

    def _waiting_s(self, spread: Spread, *, tree: bool) -> float:
        """Latencies of one lap, or of half a tree."""
        inside_s, between_s = self.table.intra_host.latency_s.value, self.table.network.latency_s.value
        steps = spread.ranks_per_host - 1
        ring_s = spread.num_hosts * steps * inside_s + (spread.num_hosts - 1) * between_s
        return min(ring_s, steps * inside_s + log2(spread.num_hosts) * between_s) if tree else ring_s

    def _ring_bandwidth_bytes_per_s(self, spread: Spread) -> float:
        """What one rank of the ring sends per second: the slower of the links inside the hosts and between them."""
        inside = self._host_bandwidth_bytes_per_s(spread.ranks_per_host)
        if spread.num_hosts == 1:
            return inside
        between = self.table.network.efficiency.value * spread.ranks_per_host * self._network_bytes_per_s
        return between if spread.ranks_per_host == 1 else min(inside, between)

    @property
    def _network_bytes_per_s(self) -> float:
        """Share of one device in its host's ports."""
        return self.flavor.network_bandwidth_bytes_per_s or self.table.network.bandwidth_bytes_per_s.value

    def _host_bandwidth_bytes_per_s(self, num_ranks: int) -> float:
        """Among `num_ranks` devices of one host. In a mesh each uses its links to the others in the group, no more."""
        links = self.table.intra_host
        bandwidth = links.bandwidth_bytes_per_s.value
        if links.pairwise_bandwidth_bytes_per_s is not None:
            bandwidth = min(bandwidth, links.pairwise_bandwidth_bytes_per_s.value * max(num_ranks - 1, 1))
        return links.efficiency.value * bandwidth
