"""Live bytes of real code that runs on tensors without data.

`Trace` is a dispatch mode. Weights and activations are fake tensors (shape, dtype and device, no bytes); token ids,
lengths and masks made from them are real, because code looks at what is in them. Every storage that is created inside
counts from its creation until nothing refers to it.
"""

import weakref
from collections import defaultdict
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Data is there to be looked at, so it is never made on the device that fake tensors stand on."""
    return kwargs if kwargs.get("device") is None else kwargs | {"device": torch.device("cpu")}


class _Literals(TorchFunctionMode):
    """`torch.tensor` of numbers makes data, and no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(_on_cpu(kwargs) if func is torch.tensor else kwargs))


class Trace(TorchDispatchMode):
    """Counts the storages created inside, and keeps the peak for each part of the code.

    Attributes:
        peaks: most live bytes by the part (see `part`) that ran at the time.
    """

    def __init__(self, fake: FakeTensorMode, *, granule: int = 64, drawn_id: int = 1) -> None:
        """Make a trace.

        Args:
            fake: the mode that the fake tensors belong to.
            granule: bytes that the allocator rounds up to.
            drawn_id: the token that sampling draws, every time.
        """
        super().__init__()
        self.peaks: dict[str, int] = defaultdict(int)
        self._fake = fake
        self._granule = granule
        self._drawn_id = drawn_id
        self._part = ""
        self._live = 0
        self._sizes: dict[weakref.ref, int] = {}
        self._known: set[int] = set()
        self._slow: set[Any] = set()
        self._literals = _Literals()

    def __enter__(self) -> Self:
        """Begin."""
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._literals.__exit__(*error)

    @property
    def live(self) -> int:
        """Bytes that are live now."""
        return self._live

    def enter_part(self, name: str) -> None:
        """From now on peaks are those of the part `name`, until the next one is entered."""
        self._part = name
        self.peaks[name] = max(self.peaks[name], self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on data where it has some, and count what it makes."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = self._run(func, args, kwargs, tensors)
        made = [out] if isinstance(out, Tensor) else [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if made:
            # Views of what was there before, of weights say, are not new.
            old = {t.untyped_storage()._cdata for t in tensors}
            for tensor in made:
                if tensor.untyped_storage()._cdata not in old:
                    self._count(tensor)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        faked = any(isinstance(t, FakeTensor) for t in tensors)
        if not faked:
            return func(*args, **_on_cpu(kwargs))
        if func is aten._local_scalar_dense.default:
            # A number that is only reported, or compared with a limit: any will do.
            return 1.0 if tensors[0].is_floating_point() else 1
        if func is aten.multinomial.default:
            rows = tensors[0].shape[:-1]
            return torch.full((*rows, args[1]), self._drawn_id, dtype=torch.long)
        if "device" not in kwargs and func not in self._slow:
            try:
                return self._on_meta(func, args, kwargs, tensors)
            except NotImplementedError:
                self._slow.add(func)
        with self._fake:
            return func(*args, **kwargs)

    def _on_meta(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What the fake mode does at heart, without the checks and the cache that make it five times slower."""
        device = next(t.device for t in tensors if isinstance(t, FakeTensor))
        if not all(isinstance(t, FakeTensor) for t in tensors):
            args, kwargs = tree_map_only(
                Tensor, lambda t: t if isinstance(t, FakeTensor) else self._fake.from_tensor(t), (args, kwargs)
            )
        with in_kernel_invocation_manager(self._fake):
            out = func(*args, **kwargs)
        if isinstance(out, FakeTensor):
            return out
        if isinstance(out, Tensor):
            return FakeTensor(self._fake, out, device)
        return tree_map_only(
            Tensor, lambda t: t if isinstance(t, FakeTensor) else FakeTensor(self._fake, t, device), out
        )

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size, key = -(-storage.nbytes() // self._granule) * self._granule, storage._cdata

        def gone(reference: weakref.ref) -> None:
            self._live -= self._sizes.pop(reference)
            self._known.discard(key)

        self._sizes[weakref.ref(storage, gone)] = size
        self._known.add(key)
        self._live += size
        if self._live > self.peaks[self._part]:
            self.peaks[self._part] = self._live
