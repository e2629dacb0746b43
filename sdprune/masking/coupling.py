"""Which outputs of linear layers feed which inputs of others: neurons and heads, found without a table of names.

A unit is a set of output rows of some layers and of input columns of one other that only make sense together: a
feed-forward neuron (rows of the first matrices, a column of the second) or an attention head (query, key and
value rows, output columns; with grouped queries a key/value head together with its queries). They are found by
probing. One block of the model runs with every linear layer replaced by a stand-in that returns zeros, except
NaN in one output unit for each row of the batch, and notes which columns of its input are NaN. A stand-in passes
no NaN on, so what arrives went through activations, gates and attention only; normalisation spreads it over all
columns, which couples nothing.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdprune.masking.linears import HOOKS, evaluating, is_linear, matrix

TOKENS = 2
PROBES = 64  # rows of the batch: so many units are probed by one forward pass


@dataclass(frozen=True, eq=False)
class Coupling:
    """The units in front of one layer: a unit without its columns contributes nothing to the consumer.

    Args:
        consumer: name of the layer whose input columns belong to the units.
        columns: (units, width) int64, the input columns of each unit; width 1 for feed-forward neurons, the
            size of a head (or of a group of heads that share keys and values) for attention.
        producers: name of each layer that feeds the consumer -> (units, rows) int64, its output rows of each unit.
    """

    consumer: str
    columns: Tensor
    producers: dict[str, Tensor]

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.columns.shape[0]

    @property
    def kind(self) -> str:
        """ "neuron" if a unit is one column of the consumer, otherwise "head"."""
        return "neuron" if self.columns.shape[1] == 1 else "head"


def find_couplings(
    model: nn.Module, names: list[str] | None = None, *, inputs: Mapping[str, Tensor] | None = None
) -> list[Coupling]:
    """Find the neurons and heads of a model by probing; the model and the random state stay as they are.

    Args:
        model: a Transformer whose blocks stand in `nn.ModuleList`s; its linear layers may be masked.
        names: the layers that may take part; None: every linear layer in the blocks.
        inputs: arguments for `model`, of which the first row is used; needed where its input is neither
            `input_ids` nor `pixel_values`.

    Returns:
        One coupling for each consumer, in the order of the model.

    Raises:
        ValueError: no stack of blocks, a block that does not run, or no coupling at all.
    """
    blocks = _blocks(model, names)
    if not blocks:
        raise ValueError("found no nn.ModuleList with linear layers in it: no neurons or heads to prune")
    kinds: dict[Any, list[str]] = {}
    for block in blocks:
        kinds.setdefault(_form(model.get_submodule(block)), []).append(block)
    allowed = None if names is None else set(names)
    couplings = []
    with torch.no_grad(), _undisturbed(model):
        calls = _recorded_calls(model, [same[0] for same in kinds.values()], inputs)
        for first, *others in kinds.values():
            args, arguments = calls[first]
            found = _probe(model.get_submodule(first), args, arguments)
            for block in (first, *others):
                couplings += [_renamed(each, block, allowed) for each in found]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    useful = [each for each in couplings if each is not None]
    if not useful:
        raise ValueError(
            "no layer's outputs feed a part of another layer's inputs: no neurons or heads to prune"
            + ("" if names is None else f" among {', '.join(names[:12])}")
        )
    return sorted(useful, key=lambda each: order[each.consumer])


def _blocks(model: nn.Module, names: list[str] | None) -> list[str]:
    """The children of the outermost stacks that hold linear layers (of `names`)."""
    stacks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{stack}." for stack in stacks)):
            stacks.append(name)
    found = []
    for stack in stacks:
        for child, block in model.get_submodule(stack).named_children():
            prefix = f"{stack}.{child}"
            linear = [f"{prefix}.{name}" for name, module in block.named_modules() if is_linear(module)]
            if linear and (names is None or set(linear) & set(names)):
                found.append(prefix)
    return found


def _form(block: nn.Module) -> tuple[Any, ...]:
    """What blocks that are wired alike have in common, so that one of them is probed for all."""
    return type(block), tuple(
        (name, type(module), tuple(matrix(module).shape) if is_linear(module) else None)
        for name, module in block.named_modules()
    )


class _StandIn:
    """The forward of a linear layer while its block is probed.

    Args:
        shape: (out, in) of the layer.
        rows: size of the batch.

    Attributes:
        row, unit: in which rows of the batch which output becomes NaN.
        reached: (rows, in), the inputs that were NaN.
    """

    def __init__(self, shape: torch.Size, rows: int, device: torch.device) -> None:
        self.shape, self.rows = shape, rows
        self.reached = torch.zeros(rows, shape[1], dtype=torch.bool, device=device)
        self.aim((), ())

    def aim(self, row: Any, unit: Any) -> None:
        self.row, self.unit = (torch.as_tensor(each, dtype=torch.long) for each in (row, unit))
        self.reached.zero_()

    def __call__(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        output = input.new_zeros(*input.shape[:-1], self.shape[0])
        # What has not the rows of the batch (relative positions, for one) belongs to all of them.
        if input.shape[0] % self.rows == 0:
            self.reached |= input.reshape(self.rows, -1, self.shape[1]).isnan().any(1)
            output.view(self.rows, -1, self.shape[0])[self.row, :, self.unit] = torch.nan
        return output


@contextmanager
def _standing_in(module: nn.Module, rows: int) -> Iterator[dict[str, _StandIn]]:
    """Replace the forward of every linear layer in the module."""
    layers = {name: layer for name, layer in module.named_modules() if is_linear(layer)}
    stand_ins = {name: _StandIn(matrix(layer).shape, rows, matrix(layer).device) for name, layer in layers.items()}
    hidden = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.__dict__["forward"] = stand_ins[name]
        yield stand_ins
    finally:
        for name, layer in layers.items():
            del layer.__dict__["forward"]
            if hidden[name] is not None:  # hooks of accelerate live there
                layer.__dict__["forward"] = hidden[name]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode with plain attention, without its hooks, and put everything back."""
    devices = sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})
    # Fused attention kernels take the maximum past NaN and return numbers; torch's own and transformers' are told so.
    attention = {id(config): (config, config._attn_implementation) for config in _configurations(model)}
    try:
        with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), evaluating(model), _without_hooks(model):
            for config, _ in attention.values():
                config._attn_implementation = "eager"
            yield
    finally:
        for config, implementation in attention.values():
            config._attn_implementation = implementation


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Set hooks aside: they would count passes that nobody made, and meet NaN."""
    hooks = {module: {key: value for key, value in vars(module).items() if key in HOOKS} for module in model.modules()}
    try:
        for module, own in hooks.items():
            vars(module).update({key: type(value)() for key, value in own.items() if value is not None})
        yield
    finally:
        for module, own in hooks.items():
            vars(module).update(own)


def _configurations(model: nn.Module) -> Iterator[Any]:
    """The configurations of the modules, an outer one before those inside it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            yield config
            for name in getattr(config, "sub_configs", ()):
                if hasattr(getattr(config, name, None), "_attn_implementation"):
                    yield getattr(config, name)


class _AllCalled(Exception):
    """Every block that is probed has been called: the rest of the forward pass is not needed."""


def _recorded_calls(
    model: nn.Module, blocks: list[str], inputs: Mapping[str, Tensor] | None
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments with which a forward pass calls the blocks first."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            calls.setdefault(name, (args, arguments))
            if len(calls) == len(blocks):
                raise _AllCalled

        return record

    body, given = _plain_inputs(model) if inputs is None else (model, inputs)
    values: dict[str, Any] = {
        name: value[:1].expand(PROBES, *value.shape[1:]) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    if "use_cache" in inspect.signature(body.forward).parameters:
        values["use_cache"] = False
    handles = [
        model.get_submodule(name).register_forward_pre_hook(recorder(name), prepend=True, with_kwargs=True)
        for name in blocks
    ]
    try:
        with _standing_in(model, PROBES):
            body(**values)
    except _AllCalled:
        return calls
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"the model's forward did not run {', '.join(set(blocks) - set(calls))}; pass `inputs` that do")


def _plain_inputs(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the body of a transformers model and inputs for it."""
    body: nn.Module = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    config: Any = getattr(body, "config", None)
    device = next(body.parameters()).device
    kind = getattr(body, "main_input_name", None)
    if kind == "input_ids":
        ids = torch.arange(1, 1 + TOKENS, device=device)[None] % config.get_text_config().vocab_size
        decoder = "decoder_input_ids" in inspect.signature(body.forward).parameters
        return body, {"input_ids": ids} | ({"decoder_input_ids": ids} if decoder else {})
    if kind == "pixel_values":
        # One patch is enough, where the model takes images of another size: attention over 196 takes minutes.
        resizes = "interpolate_pos_encoding" in inspect.signature(body.forward).parameters
        size = config.patch_size if resizes else config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(1, config.num_channels, height, width, device=device)
        return body, {"pixel_values": pixels} | ({"interpolate_pos_encoding": True} if resizes else {})
    raise ValueError(f"{type(model).__name__} takes neither input_ids nor pixel_values; pass `inputs`")


def _probe(block: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> list[Coupling]:
    """Make every output unit of every layer NaN once and find the columns that each reaches."""
    edges: dict[str, dict[str, list[Tensor]]] = {}
    with _standing_in(block, PROBES) as stand_ins:
        units = [(name, unit) for name, layer in stand_ins.items() for unit in range(layer.shape[0])]
        for start in range(0, len(units), PROBES):
            chunk = units[start : start + PROBES]
            for name, layer in stand_ins.items():
                mine = [(row, unit) for row, (owner, unit) in enumerate(chunk) if owner == name]
                layer.aim([row for row, _ in mine], [unit for _, unit in mine])
            block(*args, **arguments)
            owners = {name: [row for row, (owner, _) in enumerate(chunk) if owner == name] for name, _ in chunk}
            for consumer, layer in stand_ins.items():
                partly = layer.reached & ~layer.reached.all(1, keepdim=True)
                for producer, rows in owners.items():
                    row, column = partly[rows].cpu().nonzero(as_tuple=True)
                    if len(row):
                        first = chunk[rows[0]][1]
                        pairs = edges.setdefault(consumer, {}).setdefault(producer, [])
                        pairs.append(torch.stack([row + first, column]))
    sizes = {name: layer.shape for name, layer in stand_ins.items()}
    couplings = []
    for consumer, producers in edges.items():
        joined = {name: torch.cat(parts, 1) for name, parts in producers.items()}
        couplings.append(_connect(consumer, sizes[consumer][1], joined))
    return [each for each in couplings if each is not None]


def _connect(consumer: str, columns: int, pairs: dict[str, Tensor]) -> Coupling | None:
    """Group columns and the rows that reach them into connected components, all of one size; None if they are not."""
    label = torch.arange(columns)
    while True:  # everything connected takes the smallest label
        before = label.clone()
        for rows, ends in pairs.values():
            of_row = torch.full((int(rows.max()) + 1,), columns).scatter_reduce_(0, rows, label[ends], "amin")
            label = label.scatter_reduce(0, ends, of_row[rows], "amin")
        if torch.equal(label, before):
            break
    reached = _distinct(torch.cat([ends for _, ends in pairs.values()]))
    labels = _distinct(label[reached])
    grouped = _rows_of(labels, reached, label[reached])
    producers = {}
    for name, (rows, ends) in pairs.items():
        row = _distinct(rows)
        of_row = torch.zeros(int(row.max()) + 1, dtype=torch.long).scatter_(0, rows, label[ends])
        producers[name] = _rows_of(labels, row, of_row[row])
    if len(labels) < 2 or grouped is None or any(rows is None for rows in producers.values()):
        return None
    return Coupling(consumer, grouped, {name: rows for name, rows in producers.items() if rows is not None})


def _distinct(values: Tensor) -> Tensor:
    """The distinct values, ascending."""
    distinct: Tensor = torch.unique(values)
    return distinct


def _rows_of(labels: Tensor, members: Tensor, label: Tensor) -> Tensor | None:
    """(labels, size) int64, the members of each label; None if some have more than others."""
    size = len(members) // len(labels)
    counts = torch.bincount(torch.searchsorted(labels, label), minlength=len(labels))
    if not bool((counts == size).all()):
        return None
    return members[torch.argsort(label, stable=True)].view(len(labels), size)


def _renamed(coupling: Coupling, block: str, allowed: set[str] | None) -> Coupling | None:
    """The coupling with full names, as far as its layers are allowed."""
    consumer = f"{block}.{coupling.consumer}"
    producers = {f"{block}.{name}": rows for name, rows in coupling.producers.items()}
    if allowed is not None:
        producers = {name: rows for name, rows in producers.items() if name in allowed}
        if consumer not in allowed or not producers:
            return None
    return Coupling(consumer, coupling.columns, producers)
