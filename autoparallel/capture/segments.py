"""fx program -> which segment each node belongs to, found from structure: the module list with the most parameters
holds the blocks.

Every run of nodes inside one member of that list is a block, so a list member that is called twice makes two segments.
Nodes without a parameter or a random number in their ancestry are free (None): recomputed where needed, never sent.
"""

from __future__ import annotations

import torch
from torch import fx, nn

Segments = dict[fx.Node, int | None]


def module_path(node: fx.Node) -> str:
    """The innermost module that ran `node`, by its name in the original model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [value[0] for value in stack.values() if isinstance(value[0], str)]
    return paths[-1].removeprefix("model").removeprefix(".") if paths else ""


def block_list(model: nn.Module) -> str:
    """The name of the module list that holds the most parameters, or "" when there is none."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    return min(sizes, key=lambda name: (-sizes[name], len(name)), default="")


def free_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes with no parameter in their ancestry that draw no random number."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    free: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "output" or (node.op == "get_attr" and str(node.target) in parameters):
            continue
        random = (
            isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        )
        if not random and all(parent in free for parent in node.all_input_nodes):
            free.add(node)
    return free


def assign_segments(module: fx.GraphModule, model: nn.Module) -> Segments:
    """The segment of every op node: 0 before the blocks, the last one after them."""
    free = free_nodes(module)
    prefix = block_list(model)
    fixed = _runs(module, free, prefix + "." if prefix else "\0")
    last = max(fixed.values(), default=0) + 1
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output") and n not in free]
    earliest = _earliest(nodes, fixed)
    fed = _fed_by_inputs(module)
    latest: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        latest[node] = min((latest.get(user, last) for user in node.users), default=last)
        if node in fixed:
            latest[node] = fixed[node]
    segments: Segments = dict.fromkeys(free)
    for node in nodes:
        # What hangs on the embeddings alone stays in front; everything else, weights reshaped for later use among it,
        # goes as late as its users allow.
        in_front = earliest[node] == 0 and node in fed
        segments[node] = fixed[node] if node in fixed else (0 if in_front else latest[node])
    return segments


def _runs(module: fx.GraphModule, free: set[fx.Node], prefix: str) -> dict[fx.Node, int]:
    """Nodes inside the block list, numbered from 1 by runs of the same member."""
    fixed: dict[fx.Node, int] = {}
    member, segment = "", 0
    for node in module.graph.nodes:
        path = module_path(node) + "."
        if node.op != "call_function" or node in free or not path.startswith(prefix):
            continue
        if path[len(prefix) :].split(".")[0] != member:
            member = path[len(prefix) :].split(".")[0]
            segment += 1
        fixed[node] = segment
    return fixed


def _earliest(nodes: list[fx.Node], fixed: dict[fx.Node, int]) -> dict[fx.Node, int]:
    earliest: dict[fx.Node, int] = {}
    for node in nodes:
        earliest[node] = fixed.get(node, max((earliest.get(parent, 0) for parent in node.all_input_nodes), default=0))
    return earliest


def _fed_by_inputs(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on an input of the program, not on parameters alone."""
    fed: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(parent in fed for parent in node.all_input_nodes):
            fed.add(node)
    return fed
