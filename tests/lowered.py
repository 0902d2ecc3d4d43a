"""The workload of one rank of a strategy that names its splits, priced as the planner prices them."""

from __future__ import annotations

from autoparallel.cost.collectives import Topology
from autoparallel.cost.segments import Pricing
from autoparallel.cost.splitting import local_parameters
from autoparallel.cost.tables import load_table
from autoparallel.cost.workload import Workload
from autoparallel.ir.graph import Graph
from autoparallel.ir.precision import Precision
from autoparallel.plans.strategy import Strategy
from autoparallel.tensor_parallel.splits import SplitGraph
from tests.workloads import gpus


def lowered_workload(
    graph: Graph, strategy: Strategy, *, seq_len: int, tensor_index: int, precision: Precision
) -> Workload:
    """Local costs and parameters, so that the strategy's own degree no longer counts."""
    split, flavor = SplitGraph.of_strategy(graph, strategy), gpus(strategy.num_devices)
    table = load_table(flavor.device)
    pricing = Pricing(graph, table, Topology(flavor, table), seq_len, precision)
    lowered = [split.lowered(s, rank=tensor_index) for _, s in sorted(graph.representatives().items())]
    parameters, shared = local_parameters(graph, lowered)
    size, stride = strategy.batch_per_device, strategy.stride_of("tp")
    return Workload(
        model_name=graph.model_name,
        fingerprint=graph.fingerprint,
        flavor=flavor,
        table=table,
        batch_size=strategy.batch_size,
        seq_len=seq_len,
        memory_ratio=1.0,
        precision=precision,
        segment_classes=graph.segment_classes,
        costs={size: tuple(pricing.segment_cost(part, size, stride) for part in lowered)},
        parameters=parameters,
        shared=shared,
        step_flops=1,
    )
