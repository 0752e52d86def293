"""A simulated GPU: it computes on the CPU, is as strict as CUDA, and records what would cost time on a GPU.

Import this module before `sagan` and `pipeline`. Their `"cuda"` and `torch.cuda` then mean the simulated device:

    from tests.simulated_gpu import simulated_gpu
    from sagan import Step, TrainState

    with simulated_gpu.Record() as record:
        step = Step(TrainState(config, OptimConfig(), 0, simulated_gpu.NAME), 8, precision="bf16")
        record.clear()
        metrics = step([(simulated_gpu.upload(images), simulated_gpu.upload(labels))])
    assert not record.syncs and not record.pageable  # Counters of "operator file:line"
    simulated_gpu.host(metrics)  # the numbers, bit for bit those of the same step on the CPU

An operator raises RuntimeError where it gets a CPU tensor beside a tensor of the device, and where a stream reads what
another stream wrote without `wait_stream` and `record_stream`. Autocast follows CUDA's lists, which are read from
torch's header. With `Record(inner="meta")` nothing is computed: it counts operators, bytes and memory at full size, and
collectives leave their tensors as they are. Collectives on numbers run on gloo.

The simulation has no rounding of GPU kernels, no TF32, no reuse of freed memory, no writes in place on another stream
and no TorchScript.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simgpu"
_REWRITTEN = ("sagan", "pipeline")  # packages whose "cuda" is the simulated device
_READS_BACK = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
_COLLECTIVES = "c10d"  # namespace of torch.distributed's operators
_MAY_MIX_DEVICES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}

if early := [name for name in _REWRITTEN if name in sys.modules]:
    raise ImportError(f"import {__name__} before {early[0]}, which has read its device names already")


# --- streams and page-locked memory ----------------------------------------------------------------------------------


class Stream:
    """A stream. `awaited` holds the streams whose work so far it waits for."""

    def __init__(self, device: object = None) -> None:
        self.awaited: set[Stream] = set()

    def wait_stream(self, other: Stream) -> None:
        self.awaited.add(other)

    def synchronize(self) -> None:
        _synchronize()


class Event:
    """A mark in the current stream, for which the host can wait."""

    def record(self) -> None:
        """Do nothing: everything before the mark has been computed."""

    def synchronize(self) -> None:
        _synchronize()


_streams = [Stream()]  # the last one is current


def current_stream(device: object = None) -> Stream:
    """Return the stream of the operators that run now, as `torch.cuda.current_stream` does."""
    return _streams[-1]


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """Run operators on a stream, as `torch.cuda.stream` does."""
    for other in _streams:
        other.awaited.discard(stream)  # nobody has waited for what the stream does from now on
    _streams.append(stream)
    try:
        yield
    finally:
        _streams.pop()


_pinned: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
_empty = torch.empty


def _pin(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    if isinstance(tensor, SimulatedTensor):
        raise RuntimeError(f"cannot pin {NAME}: only dense CPU tensors can be pinned")
    pinned = tensor.clone(memory_format=torch.preserve_format)
    _pinned[pinned.untyped_storage().data_ptr()] = pinned.untyped_storage()
    return pinned


def _empty_maybe_pinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    made = _empty(*size, **options)
    return _pin(made) if pin_memory else made


def _is_pinned(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, FakeTensor):  # a tensor of torch.export, which has no bytes
        return True
    return tensor.untyped_storage().data_ptr() in _pinned


_device_memory: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
"""Memory of the device that torch.distributed hands out as tensors of the CPU, because gloo computes there."""


def _is_device_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and not isinstance(tensor, FakeTensor)
        and tensor.untyped_storage().data_ptr() in _device_memory
    )


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the device, made from page-locked memory."""
    return tensor.pin_memory().to(NAME)


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor of the device, without counting a synchronisation."""
    return tensor.inner if isinstance(tensor, SimulatedTensor) else tensor


# --- tensors ---------------------------------------------------------------------------------------------------------


class SimulatedTensor(torch.Tensor):
    """A tensor of the device. `inner` holds its numbers; `stream` wrote it; `recorded` streams may read it."""

    inner: torch.Tensor  # type: ignore[assignment]
    stream: Stream
    recorded: set[Stream]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SimulatedTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        with torch.inference_mode(False):  # torch refuses an inference tensor as a view of a parameter
            make: Any = torch.Tensor._make_wrapper_subclass
            return make(cls, inner.size(), **layout, device=torch.device(NAME, 0))

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner, self.stream, self.recorded = inner, _streams[-1], {_streams[-1]}

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _unrecorded.run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.inner})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        self.recorded.add(stream)


class Record(TorchDispatchMode):
    """A context in which operators on the device are recorded.

    Args:
        inner: Device that computes: "cpu", or "meta" to compute nothing.
        observe: Called with each operator, its unwrapped arguments, and its result.

    Attributes:
        operators: Number of calls by operator.
        collectives: Number of collectives by operator.
        syncs: Number of waits of the host for the device, by operator and line.
        pageable: Number of copies to the device from memory that is not page-locked, by operator and line.
    """

    def __init__(
        self, inner: str = "cpu", observe: Callable[[Any, Any, Any], None] = lambda func, given, out: None
    ) -> None:
        super().__init__()
        self.inner, self.observe = inner, observe
        self.clear()

    def clear(self) -> None:
        """Forget everything that was recorded."""
        self.syncs: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator: check its devices and streams, record it, and compute it on the inner device."""
        device, now = kwargs.get("device"), _streams[-1]
        tensors = tensors_of((args, kwargs))
        ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
        to_device = device is not None and torch.device(device).type == NAME
        if not ours and not to_device:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        theirs = [t for t in tensors if not isinstance(t, SimulatedTensor) and not _is_device_memory(t)]
        asks_for_host = device is not None and not to_device
        self._check_devices(func, name, ours, theirs, asks_for_host)
        if func.namespace == _COLLECTIVES:
            return self._collective(func, args, kwargs, ours)
        if any(t.stream is not now and (t.stream not in now.awaited or now not in t.recorded) for t in ours):
            raise RuntimeError(f"{func} reads what another stream wrote: wait_stream and record_stream first")
        leaves = bool(ours) and (not isinstance(args[0], SimulatedTensor) if name == "copy_" else asks_for_host)
        queued = leaves and _is_queued(name, args, kwargs)
        masks = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
        self.operators[name] += 1
        if (leaves and not queued) or masks or name in _READS_BACK:
            self.wait(name)
        if name in ("copy_", "_to_copy") and not leaves and any(t.dim() and not _is_pinned(t) for t in theirs):
            self.pageable[f"{name} {_place()}"] += 1
        if self.inner == "meta" and leaves and name == "copy_":
            return args[0]  # there are no numbers to copy
        given = _unwrapped((args, kwargs))
        given[1].update({"device": self.inner} if to_device else {})
        if queued:
            return _copied_later(name, args, given)
        out = func(*given[0], **given[1])
        self.observe(func, given, out)
        return _wrapped(out, ours, leaves)

    def wait(self, name: str) -> None:
        """Record that the host waits for the device. The copies that were queued before arrive."""
        self.syncs[f"{name} {_place()}"] += 1
        while _queued:
            host, numbers = _queued.pop(0)
            host.copy_(numbers)

    def _collective(self, func: Any, args: Any, kwargs: dict[str, Any], ours: list[SimulatedTensor]) -> Any:
        """Run a collective on the numbers of its tensors. Without numbers, run it on memory that nobody reads."""
        self.collectives[func._schema.name.split("::")[1]] += 1
        if self.inner != "meta":
            for storage in (tensor.inner.untyped_storage() for tensor in ours):
                _device_memory[storage.data_ptr()] = storage
            return _wrapped(func(*(given := _unwrapped((args, kwargs)))[0], **given[1]), ours, leaves=False)
        unread = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in ours}
        given = _with_tensors(lambda x: unread.get(id(x), x), (args, kwargs))
        back = {id(unread[id(tensor)]): tensor for tensor in ours}
        return _with_tensors(lambda x: back.get(id(x), x), func(*given[0], **given[1]))

    @staticmethod
    def _check_devices(func: Any, name: str, ours: list[Any], theirs: list[torch.Tensor], asks_for_host: bool) -> None:
        """Raise RuntimeError where CUDA would, because tensors lie on different devices."""
        needs_device = any(t.dim() or name.startswith(("_foreach", "_fused")) for t in theirs)
        if ours and needs_device and name not in _MAY_MIX_DEVICES:
            found = [(str(t.device), tuple(t.shape)) for t in (*ours, *theirs)]
            raise RuntimeError(f"{func}: expected all tensors on one device: {found}")
        if name == "_assert_tensor_metadata" and asks_for_host:  # programs of torch.export have it
            raise RuntimeError(f"tensor device mismatch in an exported program: it expects the CPU and got {NAME}")


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in the arguments or the result of an operator, which nest lists, tuples and dictionaries.

    torch's own functions for trees know more kinds of nodes, and would take half of the time of a step.
    """
    found, nodes = [], [tree]
    for node in nodes:  # grows
        if isinstance(node, torch.Tensor):
            found.append(node)
        elif isinstance(node, list | tuple):
            nodes.extend(node)
        elif isinstance(node, dict):
            nodes.extend(node.values())
    return found


def _with_tensors(change: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """Return arguments or a result of an operator with each tensor replaced by `change(tensor)`."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([_with_tensors(change, branch) for branch in tree])
    if isinstance(tree, dict):
        return {key: _with_tensors(change, branch) for key, branch in tree.items()}
    return tree


def _unwrapped(tree: Any) -> Any:
    return _with_tensors(lambda x: x.inner if isinstance(x, SimulatedTensor) else x, tree)


def _wrapped(out: Any, ours: list[SimulatedTensor], leaves: bool) -> Any:
    """Return the result of an operator as tensors of the device. Operators in place return their argument."""
    if leaves:
        return out
    known = {id(t.inner): t for t in ours}
    return _with_tensors(lambda x: known[id(x)] if id(x) in known else SimulatedTensor(x), out)


def _place() -> str:
    """Return the file and line of the project that called the operator."""
    frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "autograd"


def _synchronize(*_: object) -> None:
    """Wait for the device."""
    record = _get_current_dispatch_mode()
    (record if isinstance(record, Record) else _unrecorded).wait("synchronize")


_queued: list[tuple[torch.Tensor, torch.Tensor]] = []
"""Tensors of the host, and the numbers that arrive there at the next wait for the device."""


def _is_queued(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a copy to the host only begins. `to` makes page-locked memory for it, as with CUDA."""
    non_blocking = kwargs.get("non_blocking") or args[2:3] == (True,)
    return bool(non_blocking) and (name == "_to_copy" or (name == "copy_" and _is_pinned(args[0])))


def _copied_later(name: str, args: Any, given: Any) -> torch.Tensor:
    """Queue a copy to the host. Until the host waits, it reads NaN or zeros."""
    numbers = given[0][1].clone() if name == "copy_" else torch.ops.aten._to_copy.default(*given[0], **given[1])
    host: torch.Tensor = args[0] if name == "copy_" else _pin(torch.empty_like(numbers))
    host.fill_(math.nan if host.is_floating_point() else 0)
    _queued.append((host, numbers))
    return host


_unrecorded = Record()


# --- registration with torch -----------------------------------------------------------------------------------------


def _register() -> None:
    """Make the device known to torch under its name, and replace the functions of page-locked memory."""
    answers: dict[str, Any] = dict.fromkeys(("manual_seed_all", "current_device", "_is_in_bad_fork"), 0)
    answers |= {"is_available": 1, "is_initialized": 1, "device_count": 1, "get_amp_supported_dtype": [torch.bfloat16]}

    def answering(answer: Any) -> Callable[..., Any]:
        return lambda *_: answer

    module = types.SimpleNamespace(**{name: answering(answer) for name, answer in answers.items()})
    module.Event, module.Stream, module.stream, module.current_stream = Event, Stream, on_stream, current_stream
    module.synchronize = _synchronize
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # assigning `data` would not move `inner`
    torch.Tensor.pin_memory = _pin  # type: ignore[assignment, method-assign]
    torch.empty = _empty_maybe_pinned  # type: ignore[assignment]
    clip_grad: Any = torch.nn.utils.clip_grad
    has_foreach = clip_grad._has_foreach_support  # it knows the class torch.Tensor alone
    clip_grad._has_foreach_support = lambda tensors, device: device.type == NAME or has_foreach(tensors, device)


def _register_autocast() -> list[torch.library.Library]:
    """Give the device CUDA's autocast lists. Return what must stay alive."""
    aten, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    for policy in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        listed = re.search(rf"#define AT_FORALL_{policy}\(_\)((?:.*\\\n)*.*)", header)
        assert listed is not None, f"torch's header has no list {policy}"
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", listed[1]):
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
            aten.impl(op, _autocast_kernel(op, policy), "AutocastPrivateUse1")
    return [aten, others]


def _autocast_kernel(op: Any, policy: str) -> Callable[..., Any]:
    """Return the operator with its arguments cast by a policy of CUDA's autocast."""

    def is_cast(x: Any) -> bool:
        return isinstance(x, SimulatedTensor) and x.is_floating_point() and x.dtype != torch.float64

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):  # type: ignore[attr-defined]
            if policy == "FP32_SET_OPT_DTYPE":
                given = any(isinstance(x, torch.dtype) for x in args) or not is_cast(args[0])
                return op(*args, **kwargs if given else {**kwargs, "dtype": kwargs.get("dtype") or torch.float32})
            wide = any(is_cast(x) and x.dtype == torch.float32 for x in tensors_of((args, kwargs)))
            lower = policy == "LOWER_PRECISION_FP" or (policy == "PROMOTE" and not wide)
            dtype = torch.get_autocast_dtype(NAME) if lower else torch.float32

            def cast(x: Any) -> Any:
                return x.to(dtype) if is_cast(x) and x.dtype != dtype else x

            return op(*_with_tensors(cast, args), **_with_tensors(cast, kwargs))

    return kernel


def _rewrite_packages() -> None:
    """Let the project's packages say the simulated device where their source says CUDA."""
    get_code = SourceFileLoader.get_code

    def rewritten(self: SourceFileLoader, fullname: str) -> Any:
        if fullname.split(".")[0] not in _REWRITTEN:
            return get_code(self, fullname)
        source = self.get_data(self.path).decode().replace('"cuda"', f'"{NAME}"').replace("torch.cuda", f"torch.{NAME}")
        return compile(source, self.path, "exec", dont_inherit=True)  # never cached: other processes read the cache

    SourceFileLoader.get_code = rewritten  # type: ignore[method-assign, assignment]


def _choose_forms() -> None:
    """Let both devices compute the same form of each layer that has several. Other forms round differently.

    Both filter weights as CUDA does, and compute attention by its maps as CPUs do.
    """
    from sagan import attention, resample

    resample._filters_weight = lambda x, side: side >= 16
    attention._attends_blockwise = lambda values: False


_register()
_libraries = _register_autocast()
_rewrite_packages()
_choose_forms()
