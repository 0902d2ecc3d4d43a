"""A flavor names the hardware: how many devices, of which kind, in how many hosts, with how much memory."""

from __future__ import annotations

from pydantic import Field

from autoparallel.ir.schema import Schema


class Flavor(Schema):
    """A cluster of equal devices. `device` names a cost table of `cost_models/`."""

    name: str
    device: str
    num_devices: int = Field(ge=1)
    devices_per_host: int = Field(ge=1)
    memory_bytes: int = Field(ge=1)
    """Memory of one device. For CPU flavors: this process's share of the host's memory."""
    cores_per_host: int | None = None
    """CPU flavors only: cores that all processes of a host share; None where each device computes by itself."""

    network_bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    """Share of one device in its host's ports, one direction, where the cluster's differs from the cost table's."""

    @property
    def num_hosts(self) -> int:
        return -(-self.num_devices // self.devices_per_host)

    @property
    def local_devices(self) -> int:
        """Devices in one host."""
        return min(self.num_devices, self.devices_per_host)

    @property
    def is_cpu(self) -> bool:
        return self.cores_per_host is not None
