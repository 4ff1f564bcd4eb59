"""Reward functions: written in Python, named by a flag or handed over, with the signature that TRL's GRPO calls."""

import difflib
import functools
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fourscore.errors import FourscoreError, RewardError
from fourscore.rewards.samples import Notes, Samples, label

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every function is given, beside the columns of the dataset."""


class Function:
    """A reward function, sync or async."""

    may_abstain = True

    def __init__(self, function: Callable[..., Any], named: str = "reward_funcs", kind: str = "reward") -> None:
        """Wrap a function.

        Args:
            function: called with keywords.
            named: how messages call it before it is called: the flag and its value.
            kind: what they call it later, before its name.
        """
        self.kind = kind
        self.name = function_name(function)
        self._function = function
        self._named = named
        call = getattr(function, "__call__", None)  # noqa: B004  (of an object, which may be async)
        self.is_async = inspect.iscoroutinefunction(_unwrapped(function)) or inspect.iscoroutinefunction(call)
        try:
            self._parameters: dict[str, inspect.Parameter] | None = dict(inspect.signature(function).parameters)
        except (ValueError, TypeError):  # some that are written in C
            self._parameters = None

    def check(self, columns: Iterable[str]) -> None:
        """Hold the function's signature against what it will be called with.

        Args:
            columns: of the dataset, beside the prompt.

        Raises:
            FourscoreError: it asks for something else.
        """
        columns = list(columns)
        given = {*ARGUMENTS, *columns}
        for name, parameter in (self._parameters or {}).items():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise FourscoreError(f"{self._named}: takes {name!r} by position, and is called with keywords")
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if variadic or parameter.default is not parameter.empty or name in given:
                continue
            raise FourscoreError(
                f"{self._named}: asks for {name!r}, which is neither a column of the prompts "
                f"({', '.join(columns) or 'they have no other'}) nor one of {', '.join(ARGUMENTS)}"
            )

    def rate(self, samples: Samples, notes: Notes) -> Any:
        """Call the function; a coroutine if it is async."""
        arguments = {
            **samples.columns,
            "prompts": samples.prompts,
            "completions": samples.answers,
            "completion_ids": samples.completion_ids,
            "trainer_state": notes.state,
            "log_extra": notes.log_extra,
            "log_metric": notes.log_metric,
        }
        parameters = self._parameters
        if parameters is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        try:
            return self._function(**arguments)
        except (Exception, SystemExit) as error:
            raise failure(label(self), error) from error


def failure(reward: str, error: BaseException) -> RewardError:
    """What is said of an exception in a reward: what it is, and in which of its lines it came up."""
    if isinstance(error, RewardError):
        return error
    frame = _own_frame(error)
    where = "" if frame is None else f", in {frame.filename}, line {frame.lineno}"
    return RewardError(f"{reward} failed: {type(error).__name__}: {error}{where}")


def _own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The last one that is in nobody's library; or else the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = *map(sysconfig.get_path, ("stdlib", "platlib", "purelib")), str(Path(__file__).parents[1])
    own = [f for f in frames if not f.filename.startswith(("<", *(f"{folder}{os.sep}" for folder in libraries)))]
    return next(reversed(own or frames), None)


def function_name(function: Callable[..., Any]) -> str:
    """The name that a function has: of a partial the inner one's, of an object its class's."""
    inner = _unwrapped(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def names_function(spec: str) -> bool:
    """Whether a value of `--reward_funcs` is a function's place, rather than a checkpoint's."""
    return ":" in spec or spec.endswith(".py")


def load_function(spec: str, flag: str = "--reward_funcs") -> Callable[..., Any]:
    """The function that `path/file.py:name` or `package.module:name` names; its module is run once a process.

    Args:
        spec: the value of the flag.
        flag: for messages.

    Raises:
        FourscoreError: there is no such file, module or function.
    """
    named = f"{flag} {spec}"
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise FourscoreError(f"{named}: names no function; give {spec.strip(':')}:NAME")
    module = _run_file(Path(place).expanduser(), named) if place.endswith(".py") else _imported(place, named)
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise FourscoreError(f"{named}: {place} has no {name!r}{hint}")
        function = getattr(function, part)
    if not callable(function):
        raise FourscoreError(f"{named}: {name} is a {type(function).__name__}, not a function")
    return function


def _imported(place: str, named: str) -> types.ModuleType:
    # The command is not started from a script here, so that this folder is not on the path by itself.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a module runs whatever it likes
        raise _not_imported(named, place, error) from error


_files: dict[Path, types.ModuleType] = {}


def _run_file(path: Path, named: str) -> types.ModuleType:
    path = path.absolute()
    if path not in _files:
        if not path.is_file():
            raise FourscoreError(f"{named}: there is no such file")
        module = types.ModuleType(path.stem)
        module.__file__ = str(path)
        # Its neighbours can be imported, as from a script; nothing is written beside it.
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        sys.modules.setdefault(path.stem, module)
        try:
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        except (Exception, SystemExit) as error:  # as above
            if sys.modules.get(path.stem) is module:
                del sys.modules[path.stem]
            raise _not_imported(named, path.name, error) from error
        _files[path] = module
    return _files[path]


def _not_imported(named: str, place: str, error: BaseException) -> FourscoreError:
    frame = _own_frame(error)
    where = "" if frame is None else f", in line {frame.lineno} of {frame.filename}"
    if isinstance(error, ModuleNotFoundError | SyntaxError):  # which say so themselves
        where = ""
    return FourscoreError(f"{named}: {place} cannot be imported ({type(error).__name__}: {error}{where})")
