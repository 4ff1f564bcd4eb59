"""TRL 1.12.0, the last release with its PPO trainer, in a virtual environment of its own."""

import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

TRL = "1.12.0"
# The same releases as here, so that nothing but the trainer differs.
SAME = ("transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub", "numpy")


def trl_python(given: str | None, cache: Path) -> str:
    """The Python that has TRL: the one given, or that of `cache`/trl, which is set up on first use."""
    python = Path(given) if given else cache / "trl" / "bin" / "python"
    if given is None and not (cache / "trl" / ".installed").exists():
        _install(cache / "trl")
    question = "import importlib.metadata as m; print(m.version('trl'), m.version('transformers'), m.version('torch'))"
    asked = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    trl, *others = asked.stdout.split() or [None]
    if trl != TRL:
        sys.exit(f"--trl_python {python}: has TRL {trl}, not {TRL}; leave the flag out to have it set up")
    here = [version("transformers"), version("torch")]
    if others != here:
        print(f"note: transformers and torch are {here} here and {others} beside TRL", file=sys.stderr)
    return str(python)


def _install(folder: Path) -> None:
    print(f"setting up TRL {TRL} in {folder} ...", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    # First and alone, as in the Makefile: without a GPU this is the build for the CPU.
    subprocess.run([*pip, f"torch=={version('torch').split('+')[0]}"], check=True)
    subprocess.run([*pip, f"trl=={TRL}", *(f"{name}=={version(name)}" for name in SAME)], check=True)
    (folder / ".installed").touch()
