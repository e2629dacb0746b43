"""A pretended GPU, so that a test that would fail on a real one for its own sake fails here.

Its memory is that of the host, in which Triton's interpreter works. What lies there is known by its storage, so views
and gradients lie where their tensors do. As on a GPU, operations give results where their inputs are and refuse inputs
that lie apart, kernels are launched on nothing that lies on the host, and the backends are chosen by where tensors lie.
`conftest.py` runs tests under it.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sdp_kernels import dispatch

# What `device=` and `.to()` are asked for. To torch it is the memory of the host, yet it differs from plain "cpu".
DEVICE = torch.device("cpu", 0)

INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # takes its indices from the host too
BETWEEN_DEVICES = ("copy_", "_to_copy", "to")
WITH_A_NUMBER = ("masked_fill", "masked_fill_", "fill_", *INDEXING)  # which the host may hold, as in pointwise ones


class Rehearsal(TorchDispatchMode):
    """While entered, DEVICE is a pretended GPU; `tensor in rehearsal` tells whether a tensor lies there."""

    # Of all rehearsals, because the package keeps some tensors. A weak reference keeps the address of a storage from
    # being used again, though not the memory behind it.
    _storages: ClassVar[dict[int, StorageWeakRef]] = {}
    current: ClassVar["Rehearsal | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self._moving_to: torch.device | None = None
        self._depth = 0  # torch enters the mode anew for what is called inside of an operator
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Rehearsal":
        if not self._depth:
            for address in [address for address, storage in self._storages.items() if storage.expired()]:
                del self._storages[address]
            self._change_torch()
        self._depth += 1
        Rehearsal.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._patch.undo()
            Rehearsal.current = None

    def __contains__(self, tensor: Tensor) -> bool:
        return in_memory(tensor) and tensor.untyped_storage()._cdata in self._storages

    def put(self, tensor: Tensor) -> Tensor:
        """Let the memory of a tensor be the GPU's."""
        if in_memory(tensor):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run something that cannot work under it."""
        depth, self._depth = self._depth, 0
        self._patch.undo()
        try:
            with _disable_current_modes():
                yield
        finally:
            self._change_torch()
            self._depth = depth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        anywhere = [tensor for tensor in inputs if in_memory(tensor)]
        there = any(tensor in self for tensor in anywhere)
        if there:
            self._refuse_mixture(func, args, anywhere)
        if func._schema.name in OPDEFS:  # of this package: what it calls must be seen as well
            with self:
                result = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if self._moving_to is not None and func._schema.name in ("aten::_to_copy", "aten::to"):
            there = self._moving_to == DEVICE
        elif func is torch.ops.aten.zeros.default and torch._C._current_graph_task_id() != -1:
            there = True  # for outputs without a gradient, by C++, which names the host
        elif not anywhere or kwargs.get("device") == DEVICE:  # beside an input, C++ may have named the host
            there = kwargs.get("device") == DEVICE
        if there:
            old = {tensor.untyped_storage()._cdata for tensor in anywhere}
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and in_memory(leaf) and leaf.untyped_storage()._cdata not in old:
                    self.put(leaf)
        return result

    def _refuse_mixture(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        name = func._schema.name.removeprefix("aten::")
        numbers_may_stay = name in WITH_A_NUMBER or torch.Tag.pointwise in func.tags
        if name in INDEXING and args[0] in self:
            tensors = [args[0], *args[2:3]]
        apart = [
            tuple(each.shape) for each in tensors if each not in self and not (numbers_may_stay and each.dim() == 0)
        ]
        if apart and name not in BETWEEN_DEVICES:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but some of {name} are on the pretended GPU "
                f"and those of the shapes {apart} on cpu"
            )

    def _change_torch(self) -> None:
        """Let Python see the pretended device, which C++ does not know."""
        own_device, own_to, own_numpy, own_tensor = Tensor.device, Tensor.to, Tensor.numpy, torch.tensor
        own_compile, own_opcheck = torch.compile, torch.library.opcheck
        own_reasons = dispatch.reasons_against

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args and isinstance(args[0], Tensor):
                args = (args[0].device, args[0].dtype, *args[1:])
            copy = kwargs.pop("copy", False)
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
            options = {"dtype": dtype or tensor.dtype, "non_blocking": non_blocking, "memory_format": layout}
            options = {name: value for name, value in options.items() if value is not None}
            if device is None or device == tensor.device:
                return own_to(tensor, copy=copy, **options)
            if device.type != "cpu":
                return own_to(tensor, device, copy=copy, **options)
            self._moving_to = device
            try:
                return own_to(tensor, copy=True, **options)
            finally:
                self._moving_to = None

        def numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor in self:
                raise TypeError("can't convert a tensor of the pretended GPU to numpy")
            return own_numpy(tensor, *args, **kwargs)

        def tensor_of(data: Any, *, device: Any = None, **options: Any) -> Tensor:
            made = own_tensor(data, device=device, **options)
            return self.put(made) if device is not None and torch.device(device) == DEVICE else made

        def reasons_against(backend: str, tensors: Any, *others: Any) -> list[str]:
            reasons = own_reasons(backend, tensors, *others)
            if backend == "triton" and any(tensor not in self for tensor in tensors):
                reasons.append("a tensor is on cpu, not on the pretended GPU")
            if backend == "cpu" and any(tensor in self for tensor in tensors):
                reasons.append("a tensor is on the pretended GPU")
            return reasons

        def would_run_badly(backend: str, tensors: Any) -> bool:
            return backend == "triton" and any(
                tensor not in self or tensor.dtype == torch.bfloat16 for tensor in tensors
            )

        def compiled(*args: Any, **options: Any) -> Any:
            return self.aside(own_compile(*args, **options))

        changes = (
            (Tensor, "device", property(lambda tensor: DEVICE if tensor in self else own_device.__get__(tensor))),
            (Tensor, "to", to),
            (Tensor, "cpu", lambda tensor: tensor.to("cpu")),
            (Tensor, "numpy", numpy),
            (torch, "tensor", tensor_of),
            (dispatch, "reasons_against", reasons_against),
            (dispatch, "_would_run_badly", would_run_badly),
            (torch, "compile", compiled),
            (torch.library, "opcheck", self.aside(own_opcheck)),
        )
        for where, name, value in changes:
            self._patch.setattr(where, name, value)
        if importlib.util.find_spec("triton") is not None:
            self._change_triton()

    def _change_triton(self) -> None:
        from triton.runtime.interpreter import GridExecutor

        own_launch = GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value not in self:
                    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            with _disable_current_modes():
                own_launch(executor, *args, **kwargs)

        self._patch.setattr(GridExecutor, "__call__", launch)

    def aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What records operators sees no mode: look at where its inputs lie, and put its results there."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and in_memory(leaf)]
            there = any(tensor in self for tensor in tensors)
            if there and not all(tensor in self or tensor.dim() == 0 for tensor in tensors):
                raise RuntimeError("Expected all tensors to be on the same device, but found some on the pretended GPU")
            with self.paused():
                result = function(*args, **kwargs)
            for leaf in tree_leaves(result):
                if there and isinstance(leaf, Tensor):
                    for tensor in (leaf, *getattr(leaf.grad_fn, "saved_tensors", ())):
                        self.put(tensor)
            return result

        return wrapper


def in_memory(tensor: Tensor) -> bool:
    """Neither on the meta device, nor fake, nor a sparse one of torch, which has no storage."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.layout == torch.strided


def aside(recorder: Callable[..., Any]) -> Callable[..., Any]:
    """What `make_fx` returned, to be called under a rehearsal too; `torch.compile` and `opcheck` need no such care."""
    return recorder if Rehearsal.current is None else Rehearsal.current.aside(recorder)
