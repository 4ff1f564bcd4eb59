"""Counts how often each safetensors file is opened, and whether tensors are read or its header alone."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors

SUFFIX = ".safetensors"


class FileOpenings:
    """Stands in for `safetensors.safe_open` from when it is made, which must be before transformers is imported.

    Attributes:
        weights: by path, openings of which tensors were read.
        others: by path, openings of which none was, or that Python's own `open` did.
    """

    def __init__(self) -> None:
        self.weights: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        original = safetensors.safe_open

        def counted(filename: Any, *args: Any, **kwargs: Any) -> _Opened:
            return _Opened(original(filename, *args, **kwargs), str(Path(filename).resolve()), self)

        safetensors.safe_open = counted
        # What safetensors opens itself is not seen by this hook, so nothing counts twice.
        sys.addaudithook(self._audit)

    def reset(self) -> None:
        """Start again at none."""
        self.weights.clear()
        self.others.clear()

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith(SUFFIX):
            self.others[str(Path(args[0]).resolve())] += 1


class _Opened:
    """An open file; it counts as another opening until a tensor is read."""

    def __init__(self, file: Any, path: str, openings: FileOpenings) -> None:
        self._file = file
        self._path = path
        self._openings = openings
        self._read = False
        openings.others[path] += 1

    def __enter__(self) -> "_Opened":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Any:
        self.reads()
        return self._file.get_tensor(name)

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(self._file.get_slice(name), self)

    def reads(self) -> None:
        if not self._read:
            self._read = True
            self._openings.weights[self._path] += 1
            self._openings.others[self._path] -= 1


class _Slice:
    """A tensor not read yet: its dtype and shape are the header's."""

    def __init__(self, tensor: Any, file: _Opened) -> None:
        self._tensor = tensor
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def __getitem__(self, index: Any) -> Any:
        self._file.reads()
        return self._tensor[index]
