"""Writes `docs/config.md` and the text of `fourscore ppo --help`: `python -m fourscore.flag_docs` in a checkout."""

import dataclasses
from pathlib import Path

from fourscore.config import ModelConfig, PPOConfig, ScriptArguments
from fourscore.config_fields import GROUPS, field_default, shown_default
from fourscore.flags import HELP_FILE, render_help


def render_docs() -> str:
    """The text of `docs/config.md`."""
    defaults = {field.name: field_default(field) for field in dataclasses.fields(PPOConfig)}
    lines = [
        "# Flags",
        "",
        "Written by `python -m fourscore.flag_docs`; edit `src/fourscore/config_fields.py`, not this page.",
        "",
        "The names are those of TRL 1.12's `ScriptArguments`, `PPOConfig` and `ModelConfig`, and of",
        "`transformers.TrainingArguments`. Each can be a flag (`--kl_coef 0.1`), a key of the `--config` file or an",
        "argument in Python.",
        "",
        "## PPOConfig",
        "",
        "- **honoured**: does what TRL and transformers say it does.",
        "- **changed**: accepted; its default or its effect differs, as the note says.",
        "- **refused**: any value but the default is an error that says what to use instead.",
    ]
    for group, notes in GROUPS.items():
        lines += ["", f"### {group}", "", "| field | default | status | note |", "| --- | --- | --- | --- |"]
        for name, note in notes.items():
            text = f"{note.help} {note.note}".strip()
            lines.append(f"| `{name}` | {_code(shown_default(name, defaults[name]))} | {note.status} | {text} |")
    for dataclass_type in (ScriptArguments, ModelConfig):
        lines += ["", f"## {dataclass_type.__name__}", "", "| field | default | note |", "| --- | --- | --- |"]
        for field in dataclasses.fields(dataclass_type):
            text = str(field.metadata["help"]).replace("%%", "%")
            lines.append(f"| `{field.name}` | {_code(shown_default(field.name, field_default(field)))} | {text} |")
    return "\n".join(lines) + "\n"


def _code(text: str | None) -> str:
    return "" if text is None else f"`{text}`"


def write(root: Path) -> list[Path]:
    """Write the generated files under `root`, a checkout of fourscore. Returns their paths."""
    package = root / "src" / "fourscore"
    files = {root / "docs" / "config.md": render_docs(), package / HELP_FILE.name: render_help()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)


if __name__ == "__main__":
    for written in write(Path(__file__).parents[2]):
        print(written)
